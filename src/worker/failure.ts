import { AdapterError, DeviceLostError, OutOfMemoryError } from "../gpu/errors.ts";
import { KraitError } from "../tensor/errors.ts";
import type { Failure, FailureCode } from "./protocol.ts";

/** What a page needs to know of an error. */
export function failureOf(error: unknown): Failure {
  const message = error instanceof Error ? error.message : String(error);
  return { code: codeOf(error), message };
}

function codeOf(error: unknown): FailureCode {
  if (error instanceof AdapterError) return "no-webgpu";
  if (error instanceof DeviceLostError) return "device-lost";
  // JavaScript's own memory gives out as a RangeError: an array of that length cannot be made.
  if (error instanceof OutOfMemoryError || error instanceof RangeError) return "out-of-memory";
  return error instanceof KraitError ? "input" : "failed";
}
