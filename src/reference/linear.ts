import { ndarray, type NdArray } from "../tensor/ndarray.ts";

interface Options {
  readonly activation?: "relu2";
}

/** h = x W^T + bias. x [..., K], weight [N, K], bias [N] or null -> [..., N]. */
function affine(x: NdArray, weight: NdArray, bias: NdArray | null): NdArray {
  const [N, K] = weight.shape as [number, number];
  const h = ndarray([...x.shape.slice(0, -1), N]);
  for (let row = 0; row < h.data.length / N; row++) {
    for (let n = 0; n < N; n++) {
      let sum = bias ? bias.data[n]! : 0;
      for (let k = 0; k < K; k++) sum += x.data[row * K + k]! * weight.data[n * K + k]!;
      h.data[row * N + n] = sum;
    }
  }
  return h;
}

/**
 * y = activation(x W^T + bias) + residual. x [..., K], weight [N, K], bias [N], residual [..., N] -> [...,
 * N].
 */
export function linear(
  x: NdArray, weight: NdArray, bias: NdArray | null, residual: NdArray | null = null, options: Options = {},
): NdArray {
  const y = affine(x, weight, bias);
  if (options.activation) y.data.forEach((h, i) => (y.data[i] = Math.max(h, 0) ** 2));
  residual?.data.forEach((r, i) => (y.data[i]! += r));
  return y;
}

/**
 * dh = dy, times 2 max(h, 0) with relu2; dx = dh W, dW = dh^T x, dbias = sum of dh over rows, dresidual = dy.
 */
export function linear_vjp(
  [dy]: readonly (NdArray | null)[], x: NdArray, weight: NdArray, bias: NdArray | null,
  residual: NdArray | null = null, options: Options = {},
): (NdArray | null)[] {
  const [N, K] = weight.shape as [number, number];
  const [dx, dweight, dbias] = [ndarray(x.shape), ndarray(weight.shape), bias && ndarray(bias.shape)];
  const h = options.activation ? affine(x, weight, bias) : null;
  for (let at = 0; at < (dy?.data.length ?? 0); at++) {
    const [row, n] = [Math.floor(at / N), at % N];
    const g = dy!.data[at]! * (h ? 2 * Math.max(h.data[at]!, 0) : 1);
    if (dbias) dbias.data[n]! += g;
    for (let k = 0; k < K; k++) {
      dx.data[row * K + k]! += g * weight.data[n * K + k]!;
      dweight.data[n * K + k]! += g * x.data[row * K + k]!;
    }
  }
  return [dx, dweight, dbias, (residual && dy) ?? null, null];
}
