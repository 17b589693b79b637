import { launch } from "../kernel/launch.ts";
import type { Tensor } from "../tensor/tensor.ts";
import {
  logitGradients, type Logits, logitsExtents, type LogitsOptions, padded, walkLogits,
} from "./logits.ts";
import { defineOp } from "./op.ts";

export type LinearCrossEntropyOptions = LogitsOptions;

interface Saved {
  readonly logits: Logits;
  readonly labels: Tensor;
  readonly lse: Tensor;
  /** 1 / scored rows. */
  readonly scale: Tensor;
}

const name = "linear_cross_entropy";
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
    const { T, V } = logitsExtents(name, h, weight, labels);
    const { device } = h;
    const [lse, picked] = [device.empty([T]), device.empty([T])];
    const lanes = { WG: device.info.isSoftware ? 4 : WG };
    const logits = walkLogits(name, h, weight, options, (chunk, start, width) => {
      launch("loss/cross_entropy", {
        entry: "chunk_lse", bind: { logits: chunk, labels, lse, picked },
        params: { rows: T, stride: padded(width), width, chunk: start, vocab: V },
        constants: lanes, conditions: start === 0 ? ["first"] : [], workgroups: [T],
      });
    });
    const [scale, loss] = [device.empty([1]), device.empty([])];
    launch("loss/cross_entropy", {
      entry: "mean", bind: { labels, lse, picked, loss, scale },
      params: { rows: T, stride: 0, width: 0, chunk: 0, vocab: V }, constants: { WG }, workgroups: [1],
    });
    ctx.save({ logits, labels, lse, scale });
    return loss;
  },
  backward({ logits, labels, lse, scale }: Saved, [dloss], needs, into) {
    if (!dloss) return [];
    const [T, V] = [logits.h.shape[0]!, logits.weight.shape[0]!];
    return logitGradients(logits, needs, into, (chunk, start, width, dlogits) => {
      const stride = padded(width);
      launch("loss/cross_entropy_backward", {
        bind: { logits: chunk, labels, lse, scale, dloss, dlogits },
        params: { rows: T, stride, width, chunk: start, vocab: V },
        workgroups: [Math.ceil((T * stride) / 4 / WG)],
      });
    });
  },
});
