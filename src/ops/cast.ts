import { launch } from "../kernel/launch.ts";
import { isFloat, isHalf, type Tensor, type TensorDType } from "../tensor/tensor.ts";
import { DTypeError } from "../tensor/errors.ts";
import { defineOp } from "./op.ts";

const WG = 64;

/**
 * x in another number format, every element rounded to the nearest, ties to even; overflow gives infinity.
 * The gradient looks through the rounding and is f32.
 *
 * @param x      f32, f16 or bf16, any shape
 * @param dtype  "f32", "f16" or "bf16"
 * @throws DTypeError for an integer format
 */
export const cast = defineOp({
  name: "cast",
  halves: [0],
  forward(_ctx, x: Tensor, dtype: TensorDType): Tensor {
    for (const format of [x.dtype, dtype]) {
      if (!isFloat(format)) throw new DTypeError(
        `cast: the format must be f32, f16 or bf16, found ${format}.`);
    }
    const y = x.device.empty(x.shape, dtype);
    convert(x, y);
    return y;
  },
  backward: (_saved, [dy]) => [dy],
});

/** Writes x into y, of the same size and maybe another number format. */
export function convert(x: Tensor, y: Tensor): void {
  const EACH = x.device.info.isSoftware ? 16 : 4;
  launch("elementwise/convert", {
    bind: { x, y }, params: { count: x.size }, constants: { WG, EACH },
    conditions: [
      ...(isHalf(x.dtype) ? [`x_${x.dtype}` as const] : []), ...(
        isHalf(y.dtype) ? [`y_${y.dtype}` as const] : []),
    ],
    workgroups: [Math.ceil(x.size / 2 / (WG * EACH))],
  });
}
