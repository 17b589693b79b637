import { launch } from "../kernel/launch.ts";
import { check } from "../tensor/check.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { checkChunkSize, checkShape, groups, LARGEST, sumRows } from "./chunking.ts";
import { defineOp } from "./op.ts";

/**
 * dt = clamp(softplus(dt_raw + dt_bias), lo, hi) and a_i = sum_{m<=i} dt_m A by chunks, A = -exp(A_log).
 *
 * @param dt_raw     (B, L, H) f32
 * @param A_log      (H) f32
 * @param dt_bias    (H) f32
 * @param chunk_size Q
 * @param dt_limit   [lo, hi] with hi up to Infinity; no gradient passes where dt was clamped
 * @returns          dt and dA_cumsum (B, H, nC, Q) f32; positions after the last have dt = 0, so a stays as
 *                   it was
 *
 * Throws   ShapeError for shapes that do not fit.
 * Source   Mamba-2 (arXiv 2405.21060) section 6.
 * Tested   test/ops/chunk_cumsum.samples.ts against reference/chunk_cumsum.ts
 */
export const chunk_cumsum = defineOp({
  name: "chunk_cumsum",
  forward(
    ctx, dt_raw: Tensor, A_log: Tensor, dt_bias: Tensor, chunk_size: number,
    dt_limit: readonly [number, number],
  ) {
    const op = "chunk_cumsum";
    check(dt_raw.shape.length === 3, op, "dt_raw", "[batch, seqlen, nheads]", dt_raw);
    const [batch, seqlen, nheads] = dt_raw.shape as [number, number, number];
    checkShape(op, "A_log", A_log, [nheads]);
    checkShape(op, "dt_bias", dt_bias, [nheads]);
    checkChunkSize(op, chunk_size);
    const nchunks = Math.ceil(seqlen / chunk_size);
    const dt = dt_raw.device.empty([batch, nheads, nchunks, chunk_size]);
    const dA_cumsum = dt_raw.device.empty(dt.shape);
    const total = batch * nchunks * nheads;
    const [lo, hi] = [dt_limit[0], Math.min(dt_limit[1], LARGEST)];
    const params = { seqlen, nheads, nchunks, chunk_size, total, lo, hi };
    launch("mamba2/chunk_cumsum", {
      bind: { dt_raw, A_log, dt_bias, dt, dA_cumsum }, params, workgroups: groups(total),
    });
    ctx.save({ dt_raw, A_log, dt_bias, shape: dt.shape, params });
    return [dt, dA_cumsum];
  },
  backward({ dt_raw, A_log, dt_bias, shape, params }, [ddt, dcumsum]) {
    const { device } = dt_raw;
    const parts = [params.total / Math.max(params.nheads, 1), params.nheads];
    const ddt_raw = device.empty(dt_raw.shape);
    const dA_log_part = device.empty(parts);
    const ddt_bias_part = device.empty(parts);
    launch("mamba2/chunk_cumsum_backward", {
      bind: {
        dt_raw, A_log, dt_bias, ddt: ddt ?? device.zeros(shape), dcumsum: dcumsum ?? device.zeros(shape),
        ddt_raw, dA_log_part, ddt_bias_part,
      },
      params, workgroups: groups(params.total),
    });
    return [ddt_raw, sumRows(dA_log_part, params.nheads), sumRows(ddt_bias_part, params.nheads)];
  },
});
