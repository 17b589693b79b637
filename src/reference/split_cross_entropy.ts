import { ndarray, type NdArray } from "../tensor/ndarray.ts";

type Grads = readonly (NdArray | null)[];

interface LogSumExpOptions {
  readonly begin?: number;
  readonly total?: boolean;
}

/** Logits h weight^T, row by row. */
function logitRows(h: NdArray, weight: NdArray): number[][] {
  const [[T, D], V] = [h.shape as [number, number], weight.shape[0]!];
  return Array.from({ length: T }, (_, t) => Array.from({ length: V }, (_, v) => {
    let z = 0;
    for (let d = 0; d < D; d++) z += h.data[t * D + d]! * weight.data[v * D + d]!;
    return z;
  }));
}

function logSumExp(values: readonly number[]): number {
  const largest = values.reduce((a, b) => Math.max(a, b), -Infinity);
  return largest + Math.log(values.reduce((sum, x) => sum + Math.exp(x - largest), 0));
}

/**
 * Of each row z of h weight^T: log sum exp(z), z[label - begin] or 0 where that is no column, and with
 * `total` the sum of z. h [T, D], weight [V, D], labels [T] -> [T] each.
 */
export function linear_log_sum_exp(
  h: NdArray, weight: NdArray, labels: NdArray, { begin = 0, total = false }: LogSumExpOptions = {},
): NdArray[] {
  const rows = logitRows(h, weight);
  const of = (f: (z: readonly number[], t: number) => number) =>
    ndarray([rows.length], Float64Array.from(rows, f));
  const results = [of(logSumExp), of((z, t) => z[labels.data[t]! - begin] ?? 0)];
  return total ? [...results, of((z) => z.reduce((a, b) => a + b, 0))] : results;
}

/** dz = dlse softmax(z) + dpicked onehot(label - begin) + dtotal; dh = dz weight, dweight = dz^T h. */
export function linear_log_sum_exp_vjp(
  [dlse, dpicked, dtotal]: Grads, h: NdArray, weight: NdArray, labels: NdArray,
  { begin = 0 }: LogSumExpOptions = {},
): (NdArray | null)[] {
  const D = h.shape[1]!;
  const [dh, dweight] = [ndarray(h.shape), ndarray(weight.shape)];
  logitRows(h, weight).forEach((row, t) => {
    const lse = logSumExp(row);
    row.forEach((z, v) => {
      const hit = v === labels.data[t]! - begin ? dpicked?.data[t] ?? 0 : 0;
      const dz = (dlse?.data[t] ?? 0) * Math.exp(z - lse) + hit + (dtotal?.data[t] ?? 0);
      for (let d = 0; d < D; d++) {
        dh.data[t * D + d]! += dz * weight.data[v * D + d]!;
        dweight.data[v * D + d]! += dz * h.data[t * D + d]!;
      }
    });
  });
  return [dh, dweight, null, null];
}

interface MergeOptions {
  readonly vocab: number;
  readonly label_smoothing?: number;
}

function sharesOf({ vocab, label_smoothing: rate = 0 }: MergeOptions): { keep: number; spread: number } {
  const shared = rate === 0 ? 0 : (rate * vocab) / (vocab - 1);
  return { keep: 1 - shared, spread: shared / vocab };
}

/** Log-sum-exp of each column of lse [parts, T], and which of the rows are scored. */
function mergedRows(
  lse: NdArray, labels: NdArray, { vocab }: MergeOptions,
): { merged: number[]; scored: number[] } {
  const [parts, T] = lse.shape as [number, number];
  const merged = Array.from({ length: T }, (_, t) =>
    logSumExp(Array.from({ length: parts }, (_, r) => lse.data[r * T + t]!)));
  const scored = [...merged.keys()].filter((t) => labels.data[t]! >= 0 && labels.data[t]! < vocab);
  return { merged, scored };
}

/** Mean over scored rows of log sum exp(lse) - keep picked - spread total. lse [parts, T], the others [T]. */
export function merged_cross_entropy(
  lse: NdArray, picked: NdArray, total: NdArray | null, labels: NdArray, options: MergeOptions,
): NdArray {
  const { merged, scored } = mergedRows(lse, labels, options);
  const { keep, spread } = sharesOf(options);
  let sum = 0;
  for (const t of scored) sum += merged[t]! - keep * picked.data[t]! - spread * (total?.data[t] ?? 0);
  return ndarray([], [scored.length > 0 ? sum / scored.length : 0]);
}

export function merged_cross_entropy_vjp(
  [dloss]: Grads, lse: NdArray, picked: NdArray, total: NdArray | null, labels: NdArray,
  options: MergeOptions,
): (NdArray | null)[] {
  const [parts, T] = lse.shape as [number, number];
  const { merged, scored } = mergedRows(lse, labels, options);
  const { keep, spread } = sharesOf(options);
  const [dlse, dpicked, dtotal] = [ndarray(lse.shape), ndarray(picked.shape), ndarray([T])];
  for (const t of dloss ? scored : []) {
    const d = dloss!.data[0]! / scored.length;
    for (let r = 0; r < parts; r++) dlse.data[r * T + t] = d * Math.exp(lse.data[r * T + t]! - merged[t]!);
    dpicked.data[t] = -keep * d;
    dtotal.data[t] = -spread * d;
  }
  return [dlse, dpicked, total && dtotal, null, null];
}
