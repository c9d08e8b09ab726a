// One column of the page: an answer as it streams, and its numbers.

import { streamChat } from "./api.js";
import { sharesOf } from "./memory.js";

const NUMBER = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const FRACTION = new Intl.NumberFormat("en", { minimumFractionDigits: 2, maximumFractionDigits: 2 });
const PERCENT = new Intl.NumberFormat("en", { style: "percent", minimumFractionDigits: 1, maximumFractionDigits: 1 });
const ENDS = { stop: "Done.", length: "Done: max_tokens reached." };

/** Formats a time for the page. */
export function secondsOf(seconds) {
  return `${FRACTION.format(seconds)} s`;
}

export class Answer {
  /** root: a `section` made from the page's template. */
  constructor(root) {
    this.root = root;
    this.figures = Object.fromEntries(
      [...root.querySelectorAll("[data-figure]")].map((figure) => [figure.dataset.figure, figure]),
    );
  }

  /** Empties the column. Everything in it is set as text: a model's answer is never read as HTML. */
  reset(title) {
    this.#part("h2").textContent = title;
    this.#part(".text").setAttribute("aria-label", title);
    for (const name of [".state", ".error", ".reasoning", ".text", ".caption", ".reason"]) this.#part(name).textContent = "";
    for (const figure of Object.values(this.figures)) figure.textContent = "–";
    this.#hideMemory(true);
  }

  /**
   * Streams one answer to its end. Returns the seconds to its first token, or null if none came. Shows that the answer
   * has ended before it throws an error of the server or the network.
   */
  async run(body, key, signal, groups) {
    const watch = new Stopwatch();
    let end = "Done.";
    this.root.setAttribute("aria-busy", "true");
    this.setState("Waiting for the first token …");
    try {
      for await (const chunk of streamChat(body, key, signal)) {
        const choice = chunk.choices[0];
        if (choice) {
          this.#part(".reasoning").append(choice.delta.reasoning ?? "");
          this.#part(".text").append(choice.delta.content ?? "");
          end = ENDS[choice.finish_reason] ?? end;
          watch.note(chunk.usage.completion_tokens);
        }
        this.#showFigures(chunk.usage, watch, groups);
      }
      this.setState(end);
      return watch.seconds;
    } catch (error) {
      this.setState(signal.aborted ? "Stopped." : "Failed.");
      throw error;
    } finally {
      this.root.setAttribute("aria-busy", "false");
    }
  }

  setState(text) {
    const state = this.#part(".state");
    if (state.textContent !== text) state.textContent = text; // a screen reader speaks each change
  }

  showError(message) {
    this.#part(".error").textContent = message;
  }

  #showFigures(usage, watch, groups) {
    this.figures.prompt.textContent = NUMBER.format(usage.prompt_tokens);
    this.figures.generated.textContent = NUMBER.format(usage.completion_tokens);
    if (watch.first !== null) {
      this.setState("Streaming …");
      this.figures.first.textContent = secondsOf(watch.seconds);
    }
    // Only the last chunk of a stream has it, if the server reports it at all.
    const cached = usage.prompt_tokens_details?.cached_tokens;
    if (cached != null) this.figures.cached.textContent = NUMBER.format(cached);
    if (watch.speed !== null) this.figures.speed.textContent = FRACTION.format(watch.speed);
    if (usage.kv_cache) this.#showMemory(usage.kv_cache, groups);
  }

  #showMemory(numbers, groups) {
    const { uncompressed, compressed } = sharesOf(groups, numbers);
    const caption = `Memory of the whole KV cache: ${PERCENT.format(numbers.memory_ratio)} of uncompressed`;
    const bar = this.#part(".bar");
    this.figures.kept.textContent = NUMBER.format(numbers.kept_tokens);
    this.figures.evicted.textContent = NUMBER.format(numbers.evicted_tokens);
    this.figures.compactions.textContent = NUMBER.format(numbers.compactions);
    if (numbers.found_tokens !== undefined) this.figures.found.textContent = NUMBER.format(numbers.found_tokens);
    this.#part(".caption").textContent = caption;
    this.#part(".reason").textContent = numbers.reason ? `Kept whole: ${numbers.reason}` : "";
    this.#part(".bar .uncompressed").style.width = `${100 * uncompressed}%`;
    this.#part(".bar .compressed").style.width = `${100 * compressed}%`;
    bar.setAttribute("aria-label", caption);
    bar.setAttribute("aria-valuenow", (100 * numbers.memory_ratio).toFixed(1));
    this.#hideMemory(false);
  }

  #hideMemory(hidden) {
    for (const name of [".bar", ".legend"]) this.#part(name).hidden = hidden;
  }

  #part(selector) {
    return this.root.querySelector(selector);
  }
}

/** Measures, in milliseconds, when a request was sent and when its first tokens came, and how fast the rest followed. */
class Stopwatch {
  sent = performance.now();
  first = null;
  speed = null; // tokens per second

  /** Seconds from sending the request to its first tokens; null before they come. */
  get seconds() {
    return this.first === null ? null : (this.first - this.sent) / 1000;
  }

  /** numTokens: tokens generated so far. */
  note(numTokens) {
    const now = performance.now();
    if (this.first === null && numTokens > 0) {
      this.first = now;
      this.firstTokens = numTokens;
    } else if (this.first !== null && numTokens > this.firstTokens) {
      this.speed = ((numTokens - this.firstTokens) / (now - this.first)) * 1000;
    }
  }
}
