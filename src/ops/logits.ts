/** Logits h W^T one chunk of the vocabulary at a time, so that they are never whole in memory. */
import { check } from "../tensor/check.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { product } from "./gemm.ts";
import type { Destinations } from "./op.ts";

export interface LogitsOptions {
  /** Columns of the logits that are in memory at a time; default: 8192, fewer when there are many rows. */
  readonly vocab_chunk?: number;
}

const LARGEST_CHUNK = 8192;
const SMALLEST_CHUNK = 256;
const CHUNK_ELEMENTS = 2 ** 24; // 64 MiB
const KEPT_ELEMENTS = 2 ** 22; // 16 MiB

/** Logits as the backward pass finds them. */
export interface Logits {
  readonly h: Tensor;
  readonly weight: Tensor;
  readonly chunk: number;
  /** Where they are one small chunk: not computed again. */
  readonly kept: Tensor | null;
}

/**
 * Rows T and words V of h [T, D], weight [V, D] and labels [T].
 * @throws ShapeError when widths or row counts differ
 */
export function logitsExtents(
  name: string, h: Tensor, weight: Tensor, labels: Tensor,
): { T: number; V: number } {
  check(h.shape.length === 2, name, "h", "[T, D]", h);
  const [T, D] = h.shape as [number, number];
  check(weight.shape.length === 2 && weight.shape[1] === D, name, "weight", `[V, ${D}]`, weight);
  check(labels.shape.length === 1 && labels.size === T, name, "labels", `[${T}]`, labels);
  return { T, V: weight.shape[0]! };
}

/**
 * Walks the chunks of h W^T, h f32 [T, D] and weight f32 [V, D].
 * @param visit reads columns start .. start + width, in rows of `padded(width)`
 * @throws ShapeError for a chunk of nothing
 */
export function walkLogits(
  name: string, h: Tensor, weight: Tensor, options: LogitsOptions,
  visit: (logits: Tensor, start: number, width: number) => void,
): Logits {
  const [T, V] = [h.shape[0]!, weight.shape[0]!];
  const affordable = Math.max(SMALLEST_CHUNK, Math.floor(CHUNK_ELEMENTS / Math.max(T, 1)));
  const wanted = options.vocab_chunk ?? Math.min(LARGEST_CHUNK, affordable);
  check(Number.isInteger(wanted) && wanted >= 1, name, "vocab_chunk", "a whole number above 0", wanted);
  const chunk = Math.min(padded(wanted), V);
  const logits = h.device.empty([T, padded(chunk)]);
  forEachChunk(V, chunk, (start, width) => {
    computeChunk(h, weight, start, width, logits);
    visit(logits, start, width);
  });
  return { h, weight, chunk, kept: chunk === V && logits.size <= KEPT_ELEMENTS ? logits : null };
}

/**
 * The gradients of h and weight, chunk by chunk.
 * @param visit writes the gradient of logits start .. start + width, zero in what fills a row up
 */
export function logitGradients(
  { h, weight, chunk, kept }: Logits, needs: readonly boolean[], into: Destinations,
  visit: (logits: Tensor, start: number, width: number, dlogits: Tensor) => void,
): (Tensor | null)[] {
  const [T, D] = h.shape as [number, number];
  const { device } = h;
  const logits = kept ?? device.empty([T, padded(chunk)]);
  const dlogits = device.empty([T, padded(chunk)]);
  const dh = needs[0] ? into.empty(0, h) : null;
  const soFar = dh ? into.soFar(0) : null;
  const dweight = needs[1] ? into.empty(1, weight) : null;
  forEachChunk(weight.shape[0]!, chunk, (start, width) => {
    const stride = padded(width);
    if (!kept) computeChunk(h, weight, start, width, logits);
    visit(logits, start, width, dlogits);
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
}

/** Rows of logits begin at multiples of four elements. */
export function padded(width: number): number {
  return Math.ceil(width / 4) * 4;
}

function forEachChunk(V: number, chunk: number, visit: (start: number, width: number) => void): void {
  for (let start = 0; start < V; start += chunk) visit(start, Math.min(chunk, V - start));
}

/** Columns start .. start + width of h W^T. */
function computeChunk(h: Tensor, weight: Tensor, start: number, width: number, logits: Tensor): void {
  const [T, D] = h.shape as [number, number];
  product({
    m: T, n: width, k: D, a: { tensor: h, row: D, col: 1 },
    b: { tensor: weight, row: 1, col: D, offset: start * D },
    c: { tensor: logits, row: padded(width) },
  });
}
