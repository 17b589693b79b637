import { launch } from "../kernel/launch.ts";
import { check } from "../tensor/check.ts";
import { DTypeError } from "../tensor/errors.ts";
import type { ElementFormat } from "../tensor/formats.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { defineOp } from "./op.ts";

const WG = 64;
/** Their numbers in the kernel. */
const NUMBERS: Readonly<Record<ElementFormat | "e8m0_floor", number>> = {
  e4m3fn: 0, e5m2: 1, e2m1: 2, bf16: 3, f16: 4, e8m0: 5, e8m0_floor: 6,
};

/**
 * The code of every value, one per word: the nearest, ties to even, or with random bits one of the two
 * around the value. Overflow saturates. E8M0 takes the power of two not below |x|, `e8m0_floor` the one not
 * above it. The same bits as `ELEMENTS` and `encodeStochastic` on the host.
 *
 * @param x       f32, any shape
 * @param random  u32 like x, of which the low 8 bits (16 for halves) count; null rounds to nearest
 * @returns u32 like x
 * @throws DTypeError for random bits with E8M0
 */
export const encode_elements = defineOp({
  name: "encode_elements",
  forward(_ctx, x: Tensor, format: ElementFormat | "e8m0_floor", random: Tensor | null): Tensor {
    if (random) {
      check(random.shape.join() === x.shape.join(), "encode_elements", "random", `[${x.shape}]`, random);
      if (format === "e8m0" || format === "e8m0_floor") {
        throw new DTypeError(`encode_elements: ${format} is not rounded at random.`);
      }
    }
    const codes = x.device.empty(x.shape, "u32");
    launch("quant/elements", {
      entry: "encode", bind: { values: x, others: random ?? x, codes },
      params: { count: x.size, format: NUMBERS[format], random: random ? 1 : 0 }, constants: { WG },
      workgroups: [Math.ceil(x.size / WG)],
    });
    return codes;
  },
});

/**
 * The value of every code, exactly; NaN and infinity where the format has them.
 *
 * @param codes  u32, any shape, one code per word
 * @returns f32 like codes
 */
export const decode_elements = defineOp({
  name: "decode_elements",
  forward(_ctx, codes: Tensor, format: ElementFormat): Tensor {
    const x = codes.device.empty(codes.shape);
    launch("quant/elements", {
      entry: "decode", bind: { values: codes, codes: x },
      params: { count: codes.size, format: NUMBERS[format], random: 0 }, constants: { WG },
      workgroups: [Math.ceil(codes.size / WG)],
    });
    return x;
  },
});

/**
 * |x| / |y| or |x| |y|, rounded to the nearest f32, ties to even, subnormal numbers kept: what WGSL's own
 * operators need not give.
 *
 * @param x, y  f32 of one shape
 * @returns f32
 */
export const exact_arithmetic = defineOp({
  name: "exact_arithmetic",
  forward(_ctx, x: Tensor, y: Tensor, operation: "divide" | "multiply"): Tensor {
    check(y.shape.join() === x.shape.join(), "exact_arithmetic", "y", `[${x.shape}]`, y);
    const z = x.device.empty(x.shape);
    launch("quant/elements", {
      entry: "arithmetic", bind: { values: x, others: y, codes: z },
      params: { count: x.size, format: operation === "divide" ? 0 : 1, random: 0 }, constants: { WG },
      workgroups: [Math.ceil(x.size / WG)],
    });
    return z;
  },
});

