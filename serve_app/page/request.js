// One transcription as one request: the upload's progress, the segments as they come, how it ended. Knows no page.
// An XMLHttpRequest, since fetch() does not say how much of a body has been sent.

// Feed it text as it arrives; it gives the events that are whole: the JSON of each server-sent event's data.
export class EventReader {
  #rest = "";
  #data = [];

  feed(text) {
    const lines = (this.#rest + text).split(/\r\n|\n|\r(?!$)/);
    this.#rest = lines.pop();
    const events = [];
    for (const line of lines) {
      if (line.startsWith("data:")) {
        this.#data.push(line.slice(5).replace(/^ /, ""));
      } else if (line === "" && this.#data.length) {
        const data = this.#data.join("\n");
        this.#data = [];
        if (data !== "[DONE]") events.push(JSON.parse(data));
      } // the rest is comments (": ping") and fields that this page has no use for
    }
    return events;
  }
}

// `on` is told: upload(sent, total), sent(), segment(segment), and then either done(answer) or failed(failure), once.
// Returns what cancels it; after that nothing more is told.
export function transcribe(file, settings, token, on) {
  const request = new XMLHttpRequest();
  const reader = new EventReader();
  let [read, isSent, ended] = [0, false, false];
  const end = (tell, what) => {
    if (!ended) {
      ended = true;
      tell(what);
    }
  };

  const receive = () => {
    if (request.status !== 200 || ended) return;
    try {
      const events = reader.feed(request.responseText.slice(read));
      read = request.responseText.length;
      for (const event of events) {
        if (ended) return;
        if (event.error) end(on.failed, explainError(event.error));
        else if (event.type === "transcript.text.segment") on.segment(event);
        else if (event.type === "transcript.text.done") end(on.done, event);
      }
    } catch (error) {
      if (!(error instanceof SyntaxError)) throw error;
      request.abort();
      end(on.failed, { title: "The server's answer cannot be read.", detail: REPORT });
    }
  };

  request.upload.addEventListener("progress", (event) => on.upload(event.loaded, event.total));
  request.upload.addEventListener("load", () => {
    isSent = true;
    on.sent();
  });
  request.addEventListener("progress", receive);
  request.addEventListener("load", () => {
    receive();
    if (request.status === 200) end(on.failed, LOST);
    else end(on.failed, explain(request.status, request.responseText, request.getResponseHeader("Retry-After")));
  });
  request.addEventListener("error", async () => {
    if (!(await isReadable(file))) end(on.failed, GONE);
    else end(on.failed, isSent ? LOST : LOST_EARLY);
  });

  request.open("POST", settings.task === "translate" ? "v1/audio/translations" : "v1/audio/transcriptions");
  request.setRequestHeader("Accept", "text/event-stream, application/json");
  if (token) request.setRequestHeader("Authorization", `Bearer ${token}`);
  request.send(form(file, settings));
  return () => {
    ended = true;
    request.abort();
  };
}

// The settings go before the file, so that a server can refuse them without reading it.
function form(file, { model, language, task, prompt, words }) {
  const form = new FormData();
  form.append("model", model);
  if (language) form.append("language", language);
  if (prompt) form.append("prompt", prompt);
  form.append("response_format", "verbose_json");
  form.append("timestamp_granularities[]", "segment");
  if (words) form.append("timestamp_granularities[]", "word");
  form.append("stream", "true");
  form.append("file", file);
  return form;
}

const REPORT = "Try again; if it stays so, tell whoever runs the server.";
const LOST = {
  title: "The connection to the server was lost.",
  detail: "Check that the server runs and that you are online, then try again.",
};
const LOST_EARLY = {
  title: "The connection to the server was lost during the upload.",
  detail:
    "Check that the server runs and that you are online, then try again. " +
    "It may also be that the server, or a proxy before it, takes no file this large.",
};
const GONE = {
  title: "The file can no longer be read.",
  detail: "It was changed, moved or removed after you chose it. Choose it again.",
};

// What to say of an answer that is not 200: a sentence, what to do, and the server's own words.
export function explain(status, body, retryAfter) {
  const { message = "", param = null } = errorOf(body);
  const say = (title, detail, more = {}) => ({ title, detail, server: message, status, ...more });
  if (status === 401 || status === 403)
    return say("The server did not take the token.", "Give another one above.", { token: true });
  if (status === 413)
    return say(
      "The recording is too large for this server.",
      "Cut it into parts, or send it in a compressed format such as MP3 or Opus if it is a WAV file.",
    );
  if (status === 429 || status === 503)
    return say("The server is busy.", `Try again ${wait(retryAfter)}.`);
  if (status === 400 && (param === null || param === "file"))
    return say("The server cannot read this file as audio.", "Check that it plays, or convert it to WAV, MP3 or FLAC.");
  if (status === 400 || status === 422)
    return say("The server does not take these settings.", "Change them above and try again.");
  if (status === 404)
    return say("The server does not have this model.", "Choose another one above, or load this page again.");
  if (status === 408 || status === 504)
    return say("The server ran out of time on this recording.", "Try again later, or cut the recording into parts.");
  return say("The server failed on this recording.", REPORT);
}

// A stream's head is out before the file is looked at, so that a refusal may be its first event.
function explainError(error) {
  if (error.type === "invalid_request_error") return explain(400, JSON.stringify({ error }));
  return {
    title: "The server stopped before the end.",
    detail: "What came before is below. Try again to have all of it.",
    server: error.message ?? "",
  };
}

function errorOf(body) {
  try {
    return JSON.parse(body).error ?? {};
  } catch {
    return {}; // a proxy's page, say: not for showing
  }
}

// Retry-After is a number of seconds or a date.
function wait(header) {
  const seconds = /^\d+$/.test(header ?? "") ? Number(header) : Math.ceil((Date.parse(header) - Date.now()) / 1000);
  if (!Number.isFinite(seconds) || seconds < 1) return "in a moment";
  return seconds < 100 ? `in ${seconds} s` : `in ${Math.ceil(seconds / 60)} minutes`;
}

async function isReadable(file) {
  try {
    await file.slice(0, 1).arrayBuffer();
    return true;
  } catch {
    return false;
  }
}
