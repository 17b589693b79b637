import { ndarray, type NdArray } from "../tensor/ndarray.ts";

/** kept [N] with missing [1] at a place where that is more. */
export function keep_largest(kept: NdArray, missing: NdArray, at: number): NdArray {
  const largest = ndarray(kept.shape, kept.data.slice());
  largest.data[at] = Math.max(kept.data[at]!, missing.data[0]!);
  return largest;
}

/** gate [1]; -1 where one of the numbers missing [N] is above 0. */
export function withhold(gate: NdArray, missing: NdArray): NdArray {
  return ndarray([1], [missing.data.some((value) => value > 0) ? -1 : gate.data[0]!]);
}
