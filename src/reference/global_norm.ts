import { ndarray, type NdArray } from "../tensor/ndarray.ts";

/** sqrt of the sum of squares over all elements of all arrays: [1]. */
export function global_norm(grads: readonly NdArray[]): NdArray {
  let sum = 0;
  for (const grad of grads) for (const value of grad.data) sum += value * value;
  return ndarray([1], [Math.sqrt(sum)]);
}

/** min(1, max_norm / (norm + 1e-6)), or -1 where the norm or the loss is not finite: [1]. */
export function clip_scale(norm: NdArray, max_norm: number, loss: NdArray | null = null): NdArray {
  const finite = [norm, loss ?? norm].every(({ data }) => Number.isFinite(data[0]));
  return ndarray([1], [finite ? Math.min(1, max_norm / (norm.data[0]! + 1e-6)) : -1]);
}
