import { ndarray, type NdArray } from "../tensor/ndarray.ts";

type Grads = readonly (NdArray | null)[];

function map(x: NdArray, f: (value: number, i: number) => number): NdArray {
  return ndarray(x.shape, x.data.map(f));
}

/** a + b, equal shapes. */
export function add(a: NdArray, b: NdArray): NdArray {
  return map(a, (value, i) => value + b.data[i]!);
}

export function add_vjp([dy]: Grads, a: NdArray, b: NdArray): (NdArray | null)[] {
  return [dy ?? ndarray(a.shape), dy ?? ndarray(b.shape)];
}

/** x + bias + residual: x and residual [..., C], bias [C]. */
export function add_bias(x: NdArray, bias: NdArray, residual: NdArray | null = null): NdArray {
  return map(x, (value, i) => value + bias.data[i % bias.data.length]! + (residual?.data[i] ?? 0));
}

/** dbias = sum of the rows of dy; x and the residual get dy. */
export function add_bias_vjp(
  [dy]: Grads, x: NdArray, bias: NdArray, residual: NdArray | null = null,
): (NdArray | null)[] {
  const dx = dy ?? ndarray(x.shape);
  const dbias = ndarray(bias.shape);
  dx.data.forEach((value, i) => {
    dbias.data[i % bias.data.length]! += value;
  });
  return [dx, dbias, residual && dx];
}

/** a * b, equal shapes. */
export function multiply(a: NdArray, b: NdArray): NdArray {
  return map(a, (value, i) => value * b.data[i]!);
}

export function multiply_vjp([dy]: Grads, a: NdArray, b: NdArray): (NdArray | null)[] {
  return dy ? [multiply(dy, b), multiply(dy, a)] : [ndarray(a.shape), ndarray(b.shape)];
}

/** x * s for a number s. */
export function scale(x: NdArray, s: number): NdArray {
  return map(x, (value) => value * s);
}

export function scale_vjp([dy]: Grads, x: NdArray, s: number): (NdArray | null)[] {
  return [dy ? map(dy, (value) => value * s) : ndarray(x.shape), null];
}

/** max(x, 0)^2 */
export function relu2(x: NdArray): NdArray {
  return map(x, (value) => Math.max(value, 0) ** 2);
}

/** dx = 2 * max(x, 0) * dy */
export function relu2_vjp([dy]: Grads, x: NdArray): (NdArray | null)[] {
  return [dy ? map(dy, (value, i) => 2 * Math.max(x.data[i]!, 0) * value) : ndarray(x.shape)];
}

/** x * sigmoid(x) */
export function silu(x: NdArray): NdArray {
  return map(x, (value) => value / (1 + Math.exp(-value)));
}

/** dx = dy * s * (1 + x * (1 - s)), s = sigmoid(x) */
export function silu_vjp([dy]: Grads, x: NdArray): (NdArray | null)[] {
  if (!dy) return [ndarray(x.shape)];
  return [map(dy, (value, i) => {
    const s = 1 / (1 + Math.exp(-x.data[i]!));
    return value * s * (1 + x.data[i]! * (1 - s));
  })];
}

/** dst + src: what `accumulate` leaves in dst. */
export function accumulate(dst: NdArray, src: NdArray): NdArray {
  for (let i = 0; i < dst.data.length; i++) dst.data[i]! += src.data[i]!;
  return dst;
}

const withColumns = (shape: readonly number[], columns: number): number[] => [...shape.slice(0, -1), columns];

/** Columns of x [..., C] as separate arrays [..., width], widths adding up to C. */
export function split_columns(x: NdArray, widths: readonly number[]): NdArray[] {
  const C = x.shape.at(-1)!;
  const rows = C === 0 ? 0 : x.data.length / C;
  let first = 0;
  return widths.map((width) => {
    const part = ndarray(withColumns(x.shape, width));
    for (let r = 0; r < rows; r++) {
      for (let c = 0; c < width; c++) part.data[r * width + c] = x.data[r * C + first + c]!;
    }
    first += width;
    return part;
  });
}

export function split_columns_vjp(grads: Grads, x: NdArray, widths: readonly number[]): (NdArray | null)[] {
  const parts = widths.map((width, i) => grads[i] ?? ndarray(withColumns(x.shape, width)));
  return [parts.reduce((left, right) => concat_columns(left, right), ndarray(withColumns(x.shape, 0))), null];
}

/** a [..., Ca] and b [..., Cb] side by side: [..., Ca + Cb]. */
export function concat_columns(a: NdArray, b: NdArray): NdArray {
  const [Ca, Cb] = [a.shape.at(-1)!, b.shape.at(-1)!];
  const y = ndarray(withColumns(a.shape, Ca + Cb));
  for (let i = 0; i < y.data.length; i++) {
    const [row, column] = [Math.floor(i / (Ca + Cb)), i % (Ca + Cb)];
    y.data[i] = column < Ca ? a.data[row * Ca + column]! : b.data[row * Cb + column - Ca]!;
  }
  return y;
}

export function concat_columns_vjp([dy]: Grads, a: NdArray, b: NdArray): (NdArray | null)[] {
  if (!dy) return [ndarray(a.shape), ndarray(b.shape)];
  return split_columns(dy, [a.shape.at(-1)!, b.shape.at(-1)!]);
}

/** y[b, t] = x[b, t + n] for t < L - n. x [B, L, D] -> [B, L - n, D]. */
export function shift_rows(x: NdArray, n: number): NdArray {
  const [B, L, D] = x.shape as [number, number, number];
  const y = ndarray([B, L - n, D]);
  for (let b = 0; b < B; b++) {
    for (let i = 0; i < (L - n) * D; i++) y.data[b * (L - n) * D + i] = x.data[(b * L + n) * D + i]!;
  }
  return y;
}

/** dx[b, t] = dy[b, t - n], zero for t < n. */
export function shift_rows_vjp([dy]: Grads, x: NdArray, n: number): (NdArray | null)[] {
  const [B, L, D] = x.shape as [number, number, number];
  const dx = ndarray(x.shape);
  for (let b = 0; dy && b < B; b++) {
    for (let i = 0; i < (L - n) * D; i++) dx.data[(b * L + n) * D + i] = dy.data[b * (L - n) * D + i]!;
  }
  return [dx, null];
}
