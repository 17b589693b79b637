import { launch } from "../kernel/launch.ts";
import { check } from "../tensor/check.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { orBlocks } from "./block_linear.ts";
import { defineOp, type Op } from "./op.ts";
import { embedding_blocks } from "./quantize.ts";

const WG = 64;
const LANES = 32; // as in embedding_backward.wgsl

interface Saved {
  readonly ids: Tensor;
  readonly shape: readonly number[];
  readonly begin: number;
}

const dense: Op<[ids: Tensor, weight: Tensor, begin?: number], Tensor> = defineOp({
  name: "embedding",
  forward(ctx, ids: Tensor, weight: Tensor, begin = 0): Tensor {
    check(weight.shape.length === 2, "embedding", "weight", "[V, D]", weight);
    const [vocab, D] = weight.shape as [number, number];
    const y = weight.device.empty([...ids.shape, D]);
    const { cols, conditions } = vectors(D);
    launch("elementwise/embedding", {
      bind: { ids, weight, y }, params: { tokens: ids.size, vocab, cols, begin }, conditions,
      workgroups: [Math.ceil((ids.size * cols) / WG)],
    });
    ctx.save({ ids, shape: weight.shape, begin });
    return y;
  },
  backward({ ids, shape, begin }: Saved, [dy], _needs, into) {
    if (!dy) return [];
    const [vocab, D] = shape as [number, number];
    const { device } = ids;
    const dweight = into.empty(1, { device, shape });
    const mask = device.zeros([vocab], "u32");
    const head = device.empty([vocab, LANES], "u32");
    const next = device.empty([ids.size], "u32");
    const { cols, conditions } = vectors(D);
    const params = { tokens: ids.size, vocab, cols, begin };
    launch("elementwise/embedding_backward", {
      entry: "link", bind: { ids, mask, head, next }, params, workgroups: [1],
    });
    launch("elementwise/embedding_backward", {
      entry: "gather", bind: { dy, mask, head, next, dweight }, params, conditions,
      workgroups: [Math.ceil((vocab * cols) / WG)],
    });
    return [null, dweight];
  },
});

function vectors(D: number): { cols: number; conditions: "vec4"[] } {
  return D % 4 === 0 ? { cols: D / 4, conditions: ["vec4"] } : { cols: D, conditions: [] };
}

/**
 * y[t] = weight[ids[t] - begin]; an id outside the table gives zeros and no gradient.
 *
 * @param ids     i32 [...]
 * @param weight  f32 [V, D], or block-quantised (`quantize`): then without a gradient
 * @param begin   the id of the first row, where weight is a part of the table; default 0
 * @returns f32 [..., D]
 * @throws ShapeError when weight is not a matrix
 */
export const embedding = orBlocks(
  dense, (ids, { codes, scales, format, global, divisor }, begin = 0) => {
    check(begin === 0, "embedding", "begin", "0 for a block-quantised weight", begin);
    return embedding_blocks(ids, codes, scales, format, divisor ?? global, divisor !== null);
  });
