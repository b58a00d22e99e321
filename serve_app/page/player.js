// Plays the local file, whole or one segment of it. Nothing is fetched: the source is a blob: address.

export class Player {
  #audio;
  #segment = null; // the one to stop at the end of; null: play on

  // `told`: moved(seconds) while it plays or is sought in, playing(yes or no), ready() when the length is known,
  // unplayable() where the browser does not know the format.
  constructor(audio, told) {
    this.#audio = audio;
    const look = () => {
      if (audio.paused) return;
      if (this.#segment && audio.currentTime >= this.#segment.end) {
        this.#segment = null;
        audio.pause(); // and the mark stays on this segment, although the next one begins here
      } else {
        told.moved(audio.currentTime);
      }
    };
    // `timeupdate` comes four times a second, too late to stop in; frames do not come in a hidden tab.
    audio.addEventListener("timeupdate", look);
    const watch = () => {
      look();
      if (!audio.paused) requestAnimationFrame(watch);
    };
    audio.addEventListener("play", () => {
      told.playing(true);
      requestAnimationFrame(watch);
    });
    audio.addEventListener("pause", () => told.playing(false));
    audio.addEventListener("loadedmetadata", () => told.ready());
    audio.addEventListener("seeking", () => {
      const time = audio.currentTime;
      if (this.#segment && (time < this.#segment.start - 0.1 || time > this.#segment.end)) this.#segment = null;
      told.moved(time);
    });
    audio.addEventListener("error", () => {
      if (audio.hasAttribute("src")) told.unplayable();
    });
  }

  // Seconds; null while not known.
  get duration() {
    return Number.isFinite(this.#audio.duration) ? this.#audio.duration : null;
  }

  load(file) {
    const last = this.#audio.src;
    this.#segment = null;
    this.#audio.src = URL.createObjectURL(file);
    if (last) URL.revokeObjectURL(last);
  }

  pause() {
    this.#audio.pause();
  }

  // From the segment's start to its end; the one that is being played is stopped.
  play(segment) {
    const audio = this.#audio;
    if (!audio.paused && this.#segment?.start === segment.start) {
      audio.pause();
      return;
    }
    this.#segment = segment;
    audio.currentTime = segment.start;
    audio.play().catch(() => {}); // another file came, or it cannot be played, of which the error event tells
  }
}
