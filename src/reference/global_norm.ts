import { ndarray, type NdArray } from "../tensor/ndarray.ts";

/** sqrt of the sum of squares over all elements of all arrays: [1]. */
export function global_norm(grads: readonly NdArray[]): NdArray {
  let sum = 0;
  for (const grad of grads) for (const value of grad.data) sum += value * value;
  return ndarray([1], [Math.sqrt(sum)]);
}

/** min(1, max_norm / (norm + 1e-6)): [1]. */
export function clip_scale(norm: NdArray, max_norm: number): NdArray {
  return ndarray([1], [Math.min(1, max_norm / (norm.data[0]! + 1e-6))]);
}
