// A transcript as txt, srt, vtt or json: the files that pipeline/formats.py writes. Pure: knows no page.

const BREAKS = /[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]+/g;
// What Python's str.strip() takes off; trim() takes U+FEFF as well, and leaves U+001C to U+001F and U+0085.
const SPACE = "[\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]+";
const ENDS = new RegExp(`^${SPACE}|${SPACE}$`, "g");

export const MEDIA_TYPES = {
  txt: "text/plain;charset=utf-8",
  srt: "application/x-subrip;charset=utf-8",
  vtt: "text/vtt;charset=utf-8",
  json: "application/json",
};

export const FORMATS = {
  txt: ({ segments }) => segments.map((segment) => `${line(segment)}\n`).join(""),
  srt: ({ segments }) => segments.map(srtCue).join("\n"),
  vtt: ({ segments }) => "WEBVTT\n" + segments.map(vttCue).join(""),
  json: ({ task, language, duration, text, segments, words }) =>
    JSON.stringify({ task, language, duration, text, segments, words: words ?? [] }) + "\n",
};

// A segment's text on one line: a blank line would end a cue.
export function line(segment) {
  return segment.text.replace(ENDS, "").replace(BREAKS, " ");
}

// HH:MM:SS.mmm, rounded as Python rounds: a half to the even millisecond.
export function timestamp(seconds, point = ".") {
  const ms = roundHalfEven(seconds * 1000);
  const [s, minutes] = [Math.floor(ms / 1000), Math.floor(ms / 60_000)];
  const pad = (n, digits = 2) => String(n).padStart(digits, "0");
  return `${pad(Math.floor(minutes / 60))}:${pad(minutes % 60)}:${pad(s % 60)}${point}${pad(ms % 1000, 3)}`;
}

// A time for reading: 0:07, 12:30, 1:02:03.
export function clock(seconds) {
  const s = Math.floor(seconds);
  const [hours, minutes, rest] = [Math.floor(s / 3600), Math.floor(s / 60) % 60, String(s % 60).padStart(2, "0")];
  return hours ? `${hours}:${String(minutes).padStart(2, "0")}:${rest}` : `${minutes}:${rest}`;
}

export function megabytes(bytes) {
  const mb = bytes / 1e6;
  return mb < 0.1 ? `${Math.ceil(bytes / 1e3)} kB` : `${mb.toFixed(mb < 10 ? 1 : 0)} MB`;
}

function srtCue(segment, index) {
  return `${index + 1}\n${times(segment, ",")}\n${line(segment).replace(/-{2,}>/g, "->")}\n`;
}

function vttCue(segment) {
  const text = line(segment).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  return `\n${times(segment, ".")}\n${text}\n`;
}

function times(segment, point) {
  return `${timestamp(segment.start, point)} --> ${timestamp(segment.end, point)}`;
}

function roundHalfEven(x) {
  const floor = Math.floor(x);
  const rest = x - floor;
  return rest > 0.5 || (rest === 0.5 && floor % 2 === 1) ? floor + 1 : floor;
}
