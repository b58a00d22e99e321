// The list of segments: a row each, in order of time, one of which may be the current one.

import { clock, line } from "./formats.js";

export class Rows {
  #list;
  #rows = []; // {segment, item, button, text}, in the order of the list
  #current = null;
  #followed = null; // the row that was current last
  #made = 0;

  // `play` is called with a segment when its row is clicked, or its button pressed.
  constructor(list, play) {
    this.#list = list;
    list.addEventListener("click", ({ target }) => {
      const row = this.#rows.find(({ item }) => item === target.closest("li"));
      const isSelecting = !target.closest("button") && !getSelection().isCollapsed; // text to copy, not a click
      if (row && !isSelecting) play(row.segment);
    });
  }

  get segments() {
    return this.#rows.map((row) => row.segment);
  }

  get last() {
    return this.#rows.at(-1)?.segment;
  }

  clear() {
    this.#list.replaceChildren();
    this.#rows = [];
    this.#current = this.#followed = null;
  }

  add(segment) {
    let index = this.#rows.length;
    while (index > 0 && this.#rows[index - 1].segment.start > segment.start) index--;
    const row = this.#make();
    this.#fill(row, segment);
    this.#list.insertBefore(row.item, this.#rows[index]?.item ?? null);
    this.#rows.splice(index, 0, row);
  }

  // The whole list. Rows are filled anew, not made anew: one may have the focus or be playing.
  set(segments) {
    while (this.#rows.length > segments.length) this.#rows.pop().item.remove();
    segments.forEach((segment, index) => {
      if (index < this.#rows.length) this.#fill(this.#rows[index], segment);
      else this.add(segment);
    });
  }

  // Marks the segment in which this time lies; null: none.
  mark(seconds) {
    const row = seconds === null ? null : this.#at(seconds);
    if (row === this.#current) return;
    this.#current?.item.removeAttribute("aria-current");
    this.#current = row;
    if (!row) return;
    row.item.setAttribute("aria-current", "true");
    // Follows what is played, unless one has scrolled away from it.
    if (this.#followed && isVisible(this.#followed.item)) row.item.scrollIntoView({ block: "nearest" });
    this.#followed = row;
  }

  #at(seconds) {
    let [low, high] = [0, this.#rows.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.#rows[middle].segment.start <= seconds) low = middle + 1;
      else high = middle;
    }
    const row = this.#rows[low - 1];
    return row && seconds < row.segment.end ? row : null;
  }

  #make() {
    const [item, button, text] = ["li", "button", "span"].map((name) => document.createElement(name));
    const id = `segment-${this.#made++}`;
    [button.type, button.id, text.id, text.dir] = ["button", `${id}-time`, `${id}-text`, "auto"];
    button.setAttribute("aria-labelledby", `${button.id} ${text.id}`);
    item.append(button, text);
    return { segment: null, item, button, text };
  }

  #fill(row, segment) {
    row.segment = segment;
    row.button.textContent = clock(segment.start);
    row.text.textContent = line(segment); // as text, whatever it looks like
  }
}

function isVisible(element) {
  const { top, bottom } = element.getBoundingClientRect();
  return bottom > 0 && top < innerHeight;
}
