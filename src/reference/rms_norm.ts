import { ndarray, type NdArray } from "../tensor/ndarray.ts";

/** y = weight * x / sqrt(mean(x^2) + eps) over the last dimension. x [..., D], weight [D] -> [..., D]. */
export function rms_norm(x: NdArray, weight: NdArray, eps: number): NdArray {
  const D = x.shape.at(-1)!;
  const y = ndarray(x.shape);
  for (let row = 0; row < x.data.length; row += D) {
    let squares = 0;
    for (let i = 0; i < D; i++) squares += x.data[row + i]! ** 2;
    const rstd = 1 / Math.sqrt(squares / D + eps);
    for (let i = 0; i < D; i++) y.data[row + i] = x.data[row + i]! * rstd * weight.data[i]!;
  }
  return y;
}

/** With g = dy * w and xhat = x * rstd: dx = rstd * (g - xhat * mean(g * xhat)), dw = sum of dy * xhat. */
export function rms_norm_vjp(
  [dy]: readonly (NdArray | null)[], x: NdArray, weight: NdArray, eps: number,
): (NdArray | null)[] {
  const D = x.shape.at(-1)!;
  const [dx, dweight] = [ndarray(x.shape), ndarray(weight.shape)];
  if (!dy) return [dx, dweight, null];
  for (let row = 0; row < x.data.length; row += D) {
    let squares = 0;
    for (let i = 0; i < D; i++) squares += x.data[row + i]! ** 2;
    const rstd = 1 / Math.sqrt(squares / D + eps);
    let dot = 0;
    for (let i = 0; i < D; i++) dot += dy.data[row + i]! * weight.data[i]! * x.data[row + i]! * rstd;
    for (let i = 0; i < D; i++) {
      const xhat = x.data[row + i]! * rstd;
      dx.data[row + i] = rstd * (dy.data[row + i]! * weight.data[i]! - (xhat * dot) / D);
      dweight.data[i]! += dy.data[row + i]! * xhat;
    }
  }
  return [dx, dweight, null];
}
