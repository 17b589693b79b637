/**
 * One line that shows how far a long command is: drawn over in place on a terminal, now and then elsewhere.
 */
import {
  type Environment, type TextStream,
  colours, formatCount, formatDuration, isLive, truncate, visibleWidth, wantsColour,
} from "./terminal.ts";

export interface ProgressUpdate {
  /** Finished steps. */
  readonly step: number;
  readonly loss?: number | undefined;
  readonly tokensPerSecond?: number | undefined;
  /** A short remark at the end of the line, such as "validation 1.83". */
  readonly note?: string | undefined;
}

export interface ProgressOptions {
  /** Steps of the whole command; without it there is no bar and no time left. */
  readonly total?: number | undefined;
  /** Finished steps at the start, when a run continues. Default 0. */
  readonly start?: number | undefined;
  /** First word of the line. Default "step". */
  readonly label?: string | undefined;
  /** Writes nothing at all: for `--json` and `--quiet`. */
  readonly silent?: boolean | undefined;
  /** Default: standard error. */
  readonly stream?: TextStream | undefined;
  /** Default: the process's environment. */
  readonly env?: Environment | undefined;
  /** Clock in milliseconds. */
  readonly now?: (() => number) | undefined;
  /** Least time between two lines when the stream is not a terminal, in milliseconds. Default 5000. */
  readonly plainInterval?: number | undefined;
}

const LIVE_INTERVAL = 80;
const HIDE_CURSOR = "\x1b[?25l";
const SHOW_CURSOR = "\x1b[?25h";
const CLEAR_LINE = "\r\x1b[2K";
const BAR_WIDTH = 24;

/**
 * Draws progress until `done`. Updates are cheap: most of them draw nothing. The cursor comes back when the
 * command ends, in whatever way.
 */
export class Progress {
  readonly #options: ProgressOptions;
  readonly #stream: TextStream;
  readonly #live: boolean;
  readonly #colours: ReturnType<typeof colours>;
  readonly #now: () => number;
  readonly #started: number;
  #latest: ProgressUpdate;
  /** The first update, from which the time left is reckoned: compiling comes before it and happens once. */
  #first: { step: number; at: number } | undefined;
  #drawnAt = -Infinity;
  #drawnStep = -1;
  #hidden = false;
  #finished = false;
  readonly #restore = (): void => this.#showCursor();

  constructor(options: ProgressOptions = {}) {
    this.#options = options;
    this.#stream = options.stream ?? process.stderr;
    const env = options.env ?? process.env;
    this.#live = isLive(this.#stream, env);
    this.#colours = colours(wantsColour(this.#stream, env));
    this.#now = options.now ?? (() => performance.now());
    this.#started = this.#now();
    this.#latest = { step: options.start ?? 0 };
    // The first plain line should say something: it waits for its interval as the others do.
    if (!this.#live) this.#drawnAt = this.#started;
  }

  /** Takes the newest figures; those that are left out keep their last value. */
  update(update: ProgressUpdate): void {
    this.#latest = { ...this.#latest, ...update };
    this.#first ??= { step: update.step, at: this.#now() };
    if (this.#options.silent || this.#finished) return;
    const interval = this.#live ? LIVE_INTERVAL : this.#options.plainInterval ?? 5000;
    if (this.#now() - this.#drawnAt >= interval) this.#draw();
  }

  /** Writes a line that stays, above the progress line. */
  log(line: string): void {
    if (this.#options.silent) return;
    if (!this.#live || this.#finished) {
      this.#stream.write(`${line}\n`);
      return;
    }
    this.#stream.write(`${CLEAR_LINE}${line}\n`);
    if (this.#drawnStep >= 0) this.#draw();
  }

  /** Ends the line: a last state that stays, or `summary` instead of it. Further calls do nothing. */
  done(summary?: string): void {
    if (this.#finished) return;
    this.#finished = true;
    if (!this.#options.silent) {
      if (summary !== undefined) this.#stream.write(`${this.#live ? CLEAR_LINE : ""}${summary}\n`);
      else if (this.#live || this.#drawnStep !== this.#latest.step) {
        this.#draw();
        if (this.#live) this.#stream.write("\n");
      }
    }
    this.#showCursor();
  }

  #draw(): void {
    this.#drawnAt = this.#now();
    this.#drawnStep = this.#latest.step;
    if (!this.#live) {
      this.#stream.write(`${this.#parts(false).join("  ")}\n`);
      return;
    }
    if (!this.#hidden) {
      this.#hidden = true;
      this.#stream.write(HIDE_CURSOR);
      process.on("exit", this.#restore);
    }
    this.#stream.write(`${CLEAR_LINE}${this.#fit(this.#parts(true))}`);
  }

  /**
   * Leaves out the bar, then parts from the end, until the line fits: a line that wraps could not be drawn
   * over.
   */
  #fit(parts: string[]): string {
    const width = (this.#stream.columns || 80) - 1;
    if (this.#options.total !== undefined && visibleWidth(parts.join("  ")) > width) parts.splice(1, 1);
    while (parts.length > 1 && visibleWidth(parts.join("  ")) > width) parts.pop();
    const line = parts.join("  ");
    return visibleWidth(line) > width ? truncate(line, width) : line;
  }

  #parts(live: boolean): string[] {
    const { total, start = 0, label = "step" } = this.#options;
    const { step, loss, tokensPerSecond, note } = this.#latest;
    const of = total === undefined ? "" : `/${total}`;
    const parts = [`${label} ${String(step).padStart(of.length - 1)}${of}`];
    const share = total === undefined ? NaN : Math.min(1, total === 0 ? 1 : step / total);
    if (live && total !== undefined) parts.push(this.#bar(share));
    if (loss !== undefined) parts.push(`loss ${Number.isFinite(loss) ? loss.toFixed(4) : loss}`);
    if (tokensPerSecond !== undefined) parts.push(`${formatCount(Math.round(tokensPerSecond))} tok/s`);
    if (this.#finished) parts.push(`took ${formatDuration((this.#now() - this.#started) / 1000)}`);
    else if (total !== undefined && step > start) {
      const since = this.#first && step > this.#first.step ? this.#first : { step: start, at: this.#started };
      const perStep = (this.#now() - since.at) / 1000 / (step - since.step);
      parts.push(`${formatDuration(Math.round(perStep * Math.max(0, total - step)))} left`);
    }
    if (note) parts.push(note);
    return parts;
  }

  #bar(share: number): string {
    const full = Math.floor(share * BAR_WIDTH);
    return this.#colours.green("━".repeat(full)) + this.#colours.dim("─".repeat(BAR_WIDTH - full));
  }

  #showCursor(): void {
    if (!this.#hidden) return;
    this.#hidden = false;
    process.off("exit", this.#restore);
    this.#stream.write(SHOW_CURSOR);
  }
}
