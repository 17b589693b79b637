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

interface Options {
  readonly activation?: "relu2";
  readonly permute?: { readonly slot_token: NdArray; readonly topk: number };
}

/** Which row of x a row of the product reads. */
const source = ({ permute }: Options, row: number): number =>
  permute ? Math.floor(permute.slot_token.data[row]! / permute.topk) : row;

function products(x: NdArray, weight: NdArray, offsets: NdArray, options: Options): NdArray {
  const [, N, K] = weight.shape as [number, number, number];
  const h = ndarray([options.permute ? options.permute.slot_token.data.length : x.shape[0]!, N]);
  forEach(offsets, N, (row, output, at) => {
    const from = source(options, row) * K;
    for (let k = 0; k < K; k++) h.data[at]! += x.data[from + k]! * weight.data[output * K + k]!;
  });
  return h;
}

/**
 * y[s] = activation(weight[e] x[row of s]) for offsets[e] <= s < offsets[e + 1]. weight [E, N, K] -> [S, N].
 */
export function grouped_linear(
  x: NdArray, weight: NdArray, offsets: NdArray, options: Options = {},
): NdArray {
  const y = products(x, weight, offsets, options);
  if (options.activation) y.data.forEach((h, i) => (y.data[i] = Math.max(h, 0) ** 2));
  return y;
}

/**
 * dh = dy, times 2 max(h, 0) with relu2; dx sums weight[e]^T dh[s], dweight[e] sums dh[s] x^T of its rows.
 */
export function grouped_linear_vjp(
  [dy]: readonly (NdArray | null)[], x: NdArray, weight: NdArray, offsets: NdArray, options: Options = {},
): (NdArray | null)[] {
  const [, N, K] = weight.shape as [number, number, number];
  const [dx, dweight] = [ndarray(x.shape), ndarray(weight.shape)];
  const h = options.activation ? products(x, weight, offsets, options) : null;
  if (dy) {
    forEach(offsets, N, (row, output, at) => {
      const from = source(options, row) * K;
      const g = dy.data[at]! * (h ? 2 * Math.max(h.data[at]!, 0) : 1);
      for (let k = 0; k < K; k++) {
        dx.data[from + k]! += g * weight.data[output * K + k]!;
        dweight.data[output * K + k]! += g * x.data[from + k]!;
      }
    });
  }
  return [dx, dweight, null];
}
