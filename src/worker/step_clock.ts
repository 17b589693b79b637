/** Steps whose mean gives speed and time left. */
const SPEED_WINDOW = 16;

/** Speed and time left from the last steps; the first compiles shaders and counts for the total only. */
export class StepClock {
  /** Milliseconds. */
  total = 0;
  readonly #tokens: number;
  #recent: number[] = [];
  #isFirst = true;

  constructor(tokens: number) {
    this.#tokens = tokens;
  }

  add(milliseconds: number): void {
    this.total += milliseconds;
    this.#recent = this.#isFirst ? [] : [...this.#recent, milliseconds].slice(-SPEED_WINDOW);
    this.#isFirst = false;
  }

  get #mean(): number | null {
    return this.#recent.length === 0 ? null : this.#recent.reduce((a, b) => a + b) / this.#recent.length;
  }

  get tokensPerSecond(): number {
    return rate(this.#tokens, this.#mean ?? this.total);
  }

  secondsFor(steps: number): number | null {
    return this.#mean === null ? null : (steps * this.#mean) / 1000;
  }
}

/** Events per second. */
export function rate(count: number, milliseconds: number): number {
  return milliseconds > 0 ? (1000 * count) / milliseconds : 0;
}
