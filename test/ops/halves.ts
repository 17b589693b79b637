import type { HalfDType } from "../../src/tensor/tensor.ts";

/**
 * The tolerance of a sample whose result is rounded to a half: one rounding, of at most half a unit in the
 * last place.
 */
export function rounded(dtype: HalfDType): { tolerance: number } {
  return { tolerance: dtype === "f16" ? 2 ** -11 : 2 ** -8 };
}
