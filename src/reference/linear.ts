import { ndarray, type NdArray } from "../tensor/ndarray.ts";

/** y = x W^T + bias. x [..., K], weight [N, K], bias [N] or null -> [..., N]. */
export function linear(x: NdArray, weight: NdArray, bias: NdArray | null): NdArray {
  const [N, K] = weight.shape as [number, number];
  const y = ndarray([...x.shape.slice(0, -1), N]);
  for (let row = 0; row < y.data.length / N; row++) {
    for (let n = 0; n < N; n++) {
      let sum = bias ? bias.data[n]! : 0;
      for (let k = 0; k < K; k++) sum += x.data[row * K + k]! * weight.data[n * K + k]!;
      y.data[row * N + n] = sum;
    }
  }
  return y;
}

/** dx = dy W, dW = dy^T x, dbias = sum of dy over rows. */
export function linear_vjp(
  [dy]: readonly (NdArray | null)[], x: NdArray, weight: NdArray, bias: NdArray | null,
): (NdArray | null)[] {
  const [N, K] = weight.shape as [number, number];
  const [dx, dweight, dbias] = [ndarray(x.shape), ndarray(weight.shape), bias && ndarray(bias.shape)];
  for (let at = 0; at < (dy?.data.length ?? 0); at++) {
    const [row, n, g] = [Math.floor(at / N), at % N, dy!.data[at]!];
    if (dbias) dbias.data[n]! += g;
    for (let k = 0; k < K; k++) {
      dx.data[row * K + k]! += g * weight.data[n * K + k]!;
      dweight.data[n * K + k]! += g * x.data[row * K + k]!;
    }
  }
  return [dx, dweight, dbias];
}
