import { launch } from "../kernel/launch.ts";
import { check } from "../tensor/check.ts";
import { sizeOf } from "../tensor/ndarray.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { defineOp } from "./op.ts";

const WG = 64;

/** Orders of a row that is cut into 2 n stretches: that of its positions, or rank r's r and 2 n - 1 - r. */
type Order = "sequence" | "ranks";

function ordered(x: Tensor, ranks: number, to: Order): Tensor {
  const [B, L] = x.shape as [number, number];
  const y = x.device.empty(x.shape, x.dtype);
  const n = 2 * ranks;
  const width = (L / n) * sizeOf(x.shape.slice(2));
  const isWide = width % 4 === 0;
  const unit = isWide ? 4 : 1;
  const parts = Math.max(1, Math.ceil(width / unit / (x.device.info.isSoftware ? 16 : 2)));
  launch("comm/zigzag", {
    bind: { src: x, dst: y },
    params: { total: B * n, n, width: width / unit, parts, to_sequence: to === "sequence" ? 1 : 0 },
    constants: { WG }, conditions: isWide ? ["vec4"] : [],
    workgroups: [width === 0 ? 0 : Math.ceil((B * n * parts) / WG)],
  });
  return y;
}

/**
 * The positions of a row from the order in which the ranks of a group hold them to their own, or back.
 *
 * @param x      [B, L, ...] of any 32-bit elements, L a multiple of 2 * ranks
 * @param ranks  ranks that share a row: rank r holds its stretches r and 2 * ranks - 1 - r of 2 * ranks
 * @param to     "sequence": of all ranks' positions, side by side, makes the row; "ranks": the other way
 * @throws ShapeError where L does not divide
 */
export const zigzag_order = defineOp({
  name: "zigzag_order",
  forward(ctx, x: Tensor, ranks: number, to: Order): Tensor {
    check(x.shape.length >= 2, "zigzag_order", "x", "[B, L, ...]", x);
    check(x.shape[1]! % (2 * ranks) === 0, "zigzag_order", "L", `a multiple of ${2 * ranks}`, x.shape[1]!);
    ctx.save({ ranks, to });
    return ordered(x, ranks, to);
  },
  backward({ ranks, to }: { ranks: number; to: Order }, [dy]) {
    return dy ? [ordered(dy, ranks, to === "sequence" ? "ranks" : "sequence")] : [];
  },
});
