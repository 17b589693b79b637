import { localsOf } from "../tensor/sharded.ts";
import type { Tensor } from "../tensor/tensor.ts";

/**
 * The choices of routers in the order of their calls: recorded at first, and after `rewind` made once more.
 * Weights follow from the logits as they are then, and their gradients flow.
 */
export class RouterReplay {
  readonly #choices: Tensor[] = [];
  #next: number | null = null;

  /** @param choices u32 (tokens, topk) of every call to come; default: they are recorded */
  constructor(choices?: readonly Tensor[]) {
    if (!choices) return;
    for (const choice of choices) this.record(choice);
    this.#next = 0;
  }

  get choices(): readonly Tensor[] {
    return this.#choices;
  }

  /** From the first call on. */
  rewind(): void {
    this.#next = 0;
  }

  get isRecording(): boolean {
    return this.#next === null;
  }

  /** What the next router is to choose; null while recording. */
  next(): Tensor | null {
    if (this.#next === null) return null;
    const choice = this.#choices[this.#next++];
    if (choice) return choice;
    throw new Error(`Choices of ${this.#choices.length} router calls were recorded, but one more is made.`);
  }

  record(choice: Tensor): void {
    // What several ranks have was perhaps given up as a whole already, and only its parts are kept.
    for (const local of localsOf(choice)) local.retain();
    this.#choices.push(choice);
  }

  dispose(): void {
    for (const local of this.#choices.splice(0).flatMap(localsOf)) local.release();
  }
}
