/** Rows that found no place in buffers of limited size: counting them, and keeping them from an update. */
import { launch } from "../kernel/launch.ts";
import { check } from "../tensor/check.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { defineOp } from "./op.ts";

/**
 * kept_at = max(kept_at, missing), in place: of several passes the worst stays.
 *
 * @param kept     u32 [N], changed
 * @param missing  u32 [1]
 * @throws ShapeError for a place beyond N
 */
export const keep_largest = defineOp({
  name: "keep_largest",
  mutates: [0],
  forward(_ctx, kept: Tensor, missing: Tensor, at: number): Tensor[] {
    const name = "keep_largest";
    check(missing.size === 1, name, "missing", "[1]", missing);
    check(Number.isInteger(at) && at >= 0 && at < kept.size, name, "at", `from 0 to ${kept.size - 1}`, at);
    launch("moe/overflow", {
      entry: "keep_largest", bind: { kept, missing }, params: { count: 1, at }, workgroups: [1],
    });
    return [];
  },
});

/**
 * The gate of an update, or -1, with which nothing is updated, where rows are missing.
 *
 * @param gate     f32 [1], as `clip_scale` gives it
 * @param missing  u32 [N]
 * @returns f32 [1]
 */
export const withhold = defineOp({
  name: "withhold",
  forward(_ctx, gate: Tensor, missing: Tensor): Tensor {
    check(gate.size === 1, "withhold", "gate", "[1]", gate);
    const held = gate.device.empty([1]);
    launch("moe/overflow", {
      entry: "withhold", bind: { gate, missing, held }, params: { count: missing.size, at: 0 },
      workgroups: [1],
    });
    return held;
  },
});
