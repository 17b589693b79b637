import { UsageError } from "../tensor/errors.ts";

/** Throws UsageError for an id outside the vocabulary. */
export function checkId(id: number, vocabSize: number): void {
  if (!Number.isSafeInteger(id) || id < 0 || id >= vocabSize) {
    throw new UsageError(`token id: expected an integer from 0 to ${vocabSize - 1}, found ${id}`);
  }
}
