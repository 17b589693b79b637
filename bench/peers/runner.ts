import type { Case, Input } from "./cases.ts";

/** A case made ready on one engine. */
export interface Prepared {
  /** Applies the op n times, each to the last result, waits for the end; milliseconds per application. */
  run(n: number): Promise<number>;
  /** Elements of the result of one application to the case's input. */
  sample(indices: readonly number[]): Promise<number[]>;
  /** Inputs as the engine has them, where it stores them in fewer bits than the case gives. */
  rounded?(): Promise<Record<string, Input>>;
  dispose(): void | Promise<void>;
  /** What of the engine answers, and how it is timed, where that is not plain. */
  readonly note: string;
}

export interface Engine {
  readonly version: string;
  /** Null where the engine has no op for the case. */
  prepare(wanted: Case): Promise<Prepared | null>;
}
