import { ndarray, type NdArray } from "../tensor/ndarray.ts";

const sigmoid = (x: number): number => 1 / (1 + Math.exp(-x));

/** n values y * silu(z) from index `start` on. */
function gated(y: NdArray, z: NdArray, start: number, n: number): number[] {
  return Array.from({ length: n }, (_, i) => {
    const gate = z.data[start + i]!;
    return y.data[start + i]! * gate * sigmoid(gate);
  });
}

/**
 * v = y * silu(z), then out = weight * v / sqrt(mean(v^2) + eps), the mean over each of `ngroups` groups of I
 * / ngroups neighbouring channels: the gate comes first, the norm second. y, z [..., I], weight [I] -> [...,
 * I].
 */
export function gated_rms_norm(
  y: NdArray, z: NdArray, weight: NdArray, ngroups: number, eps: number,
): NdArray {
  const I = y.shape.at(-1)!;
  const n = I / ngroups;
  const out = ndarray(y.shape);
  for (let start = 0; start < y.data.length; start += n) {
    const v = gated(y, z, start, n);
    const rstd = 1 / Math.sqrt(v.reduce((sum, value) => sum + value * value, 0) / n + eps);
    for (let i = 0; i < n; i++) out.data[start + i] = v[i]! * rstd * weight.data[(start + i) % I]!;
  }
  return out;
}

/**
 * With vhat = rstd * v and g = dout * w: dw = sum of dout * vhat, dv = rstd * (g - vhat * mean(g * vhat)),
 * dy = dv * silu(z), dz = dv * y * silu'(z), silu'(z) = s * (1 + z * (1 - s)), s = sigmoid(z).
 */
export function gated_rms_norm_vjp(
  [dout]: readonly (NdArray | null)[], y: NdArray, z: NdArray, weight: NdArray, ngroups: number, eps: number,
): (NdArray | null)[] {
  const I = y.shape.at(-1)!;
  const n = I / ngroups;
  const [dy, dz, dweight] = [ndarray(y.shape), ndarray(z.shape), ndarray(weight.shape)];
  if (!dout) return [dy, dz, dweight, null, null];
  for (let start = 0; start < y.data.length; start += n) {
    const v = gated(y, z, start, n);
    const rstd = 1 / Math.sqrt(v.reduce((sum, value) => sum + value * value, 0) / n + eps);
    let dot = 0;
    for (let i = 0; i < n; i++) dot += dout.data[start + i]! * weight.data[(start + i) % I]! * v[i]! * rstd;
    for (let i = 0; i < n; i++) {
      const at = start + i;
      const column = at % I;
      const s = sigmoid(z.data[at]!);
      const dv = rstd * (dout.data[at]! * weight.data[column]! - (v[i]! * rstd * dot) / n);
      dy.data[at] = dv * z.data[at]! * s;
      dz.data[at] = dv * y.data[at]! * s * (1 + z.data[at]! * (1 - s));
      dweight.data[column]! += dout.data[at]! * v[i]! * rstd;
    }
  }
  return [dy, dz, dweight, null, null];
}
