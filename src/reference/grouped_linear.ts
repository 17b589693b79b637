import { ndarray, type NdArray } from "../tensor/ndarray.ts";

type Visit = (row: number, output: number, at: number) => void;

/** Calls `visit` for every output n of every row of an expert e with (row, e * N + n, row * N + n). */
function forEach(offsets: NdArray, N: number, visit: Visit): void {
  for (let e = 0; e + 1 < offsets.data.length; e++) {
    for (let row = offsets.data[e]!; row < offsets.data[e + 1]!; row++) {
      for (let n = 0; n < N; n++) visit(row, e * N + n, row * N + n);
    }
  }
}

/** y[s] = weight[e] x[s] for offsets[e] <= s < offsets[e + 1]. x [S, K], weight [E, N, K] -> [S, N]. */
export function grouped_linear(x: NdArray, weight: NdArray, offsets: NdArray): NdArray {
  const [, N, K] = weight.shape as [number, number, number];
  const y = ndarray([x.shape[0]!, N]);
  forEach(offsets, N, (row, output, at) => {
    for (let k = 0; k < K; k++) y.data[at]! += x.data[row * K + k]! * weight.data[output * K + k]!;
  });
  return y;
}

/** dx[s] = weight[e]^T dy[s]; dweight[e] sums dy[s] x[s]^T over the rows of expert e, zero without rows. */
export function grouped_linear_vjp(
  [dy]: readonly (NdArray | null)[], x: NdArray, weight: NdArray, offsets: NdArray,
): (NdArray | null)[] {
  const [, N, K] = weight.shape as [number, number, number];
  const [dx, dweight] = [ndarray(x.shape), ndarray(weight.shape)];
  if (dy) {
    forEach(offsets, N, (row, output, at) => {
      for (let k = 0; k < K; k++) {
        dx.data[row * K + k]! += dy.data[at]! * weight.data[output * K + k]!;
        dweight.data[output * K + k]! += dy.data[at]! * x.data[row * K + k]!;
      }
    });
  }
  return [dx, dweight, null];
}
