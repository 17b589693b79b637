import { ndarray, type NdArray } from "../tensor/ndarray.ts";

/** y = exp(x) / sum(exp(x)) over the last dimension. x [..., N] -> [..., N]. */
export function softmax(x: NdArray): NdArray {
  const N = x.shape.at(-1)!;
  const y = ndarray(x.shape);
  for (let row = 0; row < x.data.length; row += N) {
    let top = -Infinity;
    for (let i = 0; i < N; i++) top = Math.max(top, x.data[row + i]!);
    let sum = 0;
    for (let i = 0; i < N; i++) sum += Math.exp(x.data[row + i]! - top);
    for (let i = 0; i < N; i++) y.data[row + i] = Math.exp(x.data[row + i]! - top) / sum;
  }
  return y;
}

/** dx = y * (dy - sum(dy * y)). */
export function softmax_vjp([dy]: readonly (NdArray | null)[], x: NdArray): (NdArray | null)[] {
  const N = x.shape.at(-1)!;
  const dx = ndarray(x.shape);
  if (!dy) return [dx];
  const y = softmax(x);
  for (let row = 0; row < x.data.length; row += N) {
    let dot = 0;
    for (let i = 0; i < N; i++) dot += dy.data[row + i]! * y.data[row + i]!;
    for (let i = 0; i < N; i++) dx.data[row + i] = y.data[row + i]! * (dy.data[row + i]! - dot);
  }
  return [dx];
}
