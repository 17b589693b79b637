import { ShapeError } from "./errors.ts";
import type { Tensor } from "./tensor.ts";

/** Throws ShapeError "op: what must be EXPECTED, found [shape]" unless `holds`. */
export function check(
  holds: boolean, op: string, what: string, expected: string, found: Tensor | readonly number[] | number,
): void {
  if (holds) return;
  const shown = typeof found === "number"
    ? String(found)
    : `[${("shape" in found ? found.shape : found).join(", ")}]`;
  throw new ShapeError(`${op}: ${what} must be ${expected}, found ${shown}.`);
}
