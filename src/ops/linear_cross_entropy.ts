import { launch } from "../kernel/launch.ts";
import { check } from "../tensor/check.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { product } from "./gemm.ts";
import { defineOp } from "./op.ts";

export interface LinearCrossEntropyOptions {
  /** Columns of the logits that are in memory at a time; default: 8192, fewer when there are many rows. */
  readonly vocab_chunk?: number;
}

interface Saved {
  readonly h: Tensor;
  readonly weight: Tensor;
  readonly labels: Tensor;
  readonly lse: Tensor;
  /** 1 / scored rows. */
  readonly scale: Tensor;
  /** The logits, where they are one small chunk: not computed again. */
  readonly logits: Tensor | null;
  readonly chunk: number;
}

const name = "linear_cross_entropy";
const LARGEST_CHUNK = 8192;
const SMALLEST_CHUNK = 256;
const CHUNK_ELEMENTS = 2 ** 24; // 64 MiB
const KEPT_ELEMENTS = 2 ** 22; // 16 MiB
const WG = 64;

/**
 * loss = mean over scored rows of -log softmax(h W^T)[label], without the whole logits in memory.
 *
 * The vocabulary is walked in chunks: forward keeps a running log-sum-exp per row, backward computes the
 * logits of a chunk again (a single chunk of at most 16 MiB is kept instead). A row is scored when its label
 * lies in 0 .. V - 1 (-100 marks rows to leave out); without scored rows the loss is 0.
 *
 * @param h       f32 [T, D]
 * @param weight  f32 [V, D]
 * @param labels  i32 [T]
 * @returns f32 []
 * @throws ShapeError when widths or row counts differ
 */
export const linear_cross_entropy = defineOp({
  name,
  forward(ctx, h: Tensor, weight: Tensor, labels: Tensor, options: LinearCrossEntropyOptions = {}): Tensor {
    check(h.shape.length === 2, name, "h", "[T, D]", h);
    const [T, D] = h.shape as [number, number];
    check(weight.shape.length === 2 && weight.shape[1] === D, name, "weight", `[V, ${D}]`, weight);
    check(labels.shape.length === 1 && labels.size === T, name, "labels", `[${T}]`, labels);
    const V = weight.shape[0]!;
    const affordable = Math.max(SMALLEST_CHUNK, Math.floor(CHUNK_ELEMENTS / Math.max(T, 1)));
    const wanted = options.vocab_chunk ?? Math.min(LARGEST_CHUNK, affordable);
    check(Number.isInteger(wanted) && wanted >= 1, name, "vocab_chunk", "a whole number above 0", wanted);
    const chunk = Math.min(padded(wanted), V);

    const { device } = h;
    const logits = device.empty([T, padded(chunk)]);
    const lse = device.empty([T]);
    const picked = device.empty([T]);
    const scale = device.empty([1]);
    const loss = device.empty([]);
    const lanes = { WG: device.info.isSoftware ? 4 : WG };
    forEachChunk(V, chunk, (start, width) => {
      logitsOf(h, weight, start, width, logits);
      launch("loss/cross_entropy", {
        entry: "chunk_lse", bind: { logits, labels, lse, picked },
        params: { rows: T, stride: padded(width), width, chunk: start, vocab: V },
        constants: lanes, conditions: start === 0 ? ["first"] : [], workgroups: [T],
      });
    });
    launch("loss/cross_entropy", {
      entry: "mean", bind: { labels, lse, picked, loss, scale },
      params: { rows: T, stride: 0, width: 0, chunk: 0, vocab: V }, constants: { WG }, workgroups: [1],
    });
    const kept = chunk === V && logits.size <= KEPT_ELEMENTS ? logits : null;
    ctx.save({ h, weight, labels, lse, scale, logits: kept, chunk });
    return loss;
  },
  backward(saved: Saved, [dloss], needs, into) {
    if (!dloss) return [];
    const { h, weight, labels, lse, scale, chunk } = saved;
    const [T, D] = h.shape as [number, number];
    const V = weight.shape[0]!;
    const { device } = h;
    const logits = saved.logits ?? device.empty([T, padded(chunk)]);
    const dlogits = device.empty([T, padded(chunk)]);
    const dh = needs[0] ? into.empty(0, h) : null;
    const soFar = dh ? into.soFar(0) : null;
    const dweight = needs[1] ? into.empty(1, weight) : null;
    forEachChunk(V, chunk, (start, width) => {
      const stride = padded(width);
      if (!saved.logits) logitsOf(h, weight, start, width, logits);
      launch("loss/cross_entropy_backward", {
        bind: { logits, labels, lse, scale, dloss, dlogits },
        params: { rows: T, stride, width, chunk: start, vocab: V },
        workgroups: [Math.ceil((T * stride) / 4 / WG)],
      });
      if (dh) {
        product({
          m: T, n: D, k: width, a: { tensor: dlogits, row: stride, col: 1 },
          b: { tensor: weight, row: D, col: 1, offset: start * D }, c: { tensor: dh, row: D },
          accumulate: start > 0, residual: start === 0 ? soFar : null,
        });
      }
      if (dweight) {
        product({
          m: width, n: D, k: T, a: { tensor: dlogits, row: 1, col: stride }, b: { tensor: h, row: D, col: 1 },
          c: { tensor: dweight, row: D, offset: start * D },
        });
      }
    });
    return [dh, dweight];
  },
});

/** Rows of logits begin at multiples of four elements. */
function padded(width: number): number {
  return Math.ceil(width / 4) * 4;
}

function forEachChunk(V: number, chunk: number, visit: (start: number, width: number) => void): void {
  for (let start = 0; start < V; start += chunk) visit(start, Math.min(chunk, V - start));
}

/** Columns start .. start + width of h W^T. */
function logitsOf(h: Tensor, weight: Tensor, start: number, width: number, logits: Tensor): void {
  const [T, D] = h.shape as [number, number];
  product({
    m: T, n: width, k: D, a: { tensor: h, row: D, col: 1 },
    b: { tensor: weight, row: 1, col: D, offset: start * D },
    c: { tensor: logits, row: padded(width) },
  });
}
