import { decode_elements, encode_elements, exact_arithmetic } from "../../src/ops/elements.ts";
import * as ref from "../../src/reference/elements.ts";
import { opSamples, type Sample } from "./suite.ts";

const FORMATS = ["e4m3fn", "e5m2", "e2m1", "bf16", "f16", "e8m0"] as const;
const BITS = { e4m3fn: 8, e5m2: 8, e2m1: 4, bf16: 16, f16: 16, e8m0: 8 };
const EDGES = [
  0, -0, NaN, Infinity, -Infinity, 1, -1.25, 464, 465, 61440, 61439, 2 ** -10, 2 ** -17, 0.25, 0.75, 5, 2.5,
  2 ** -126, 2 ** -149, -(2 ** -130), 3.4028234663852886e38, -6,
];

export default [
  opSamples({
    op: encode_elements, reference: ref.encode_elements,
    samples: [
      ...[...FORMATS, "e8m0_floor" as const].map((format): Sample => (
        { name: `${format}, edges`, args: (r) => [r.of([EDGES.length], EDGES), format, null] })),
      ...(["e4m3fn", "e5m2", "e2m1", "bf16", "f16"] as const).map((format): Sample => ({
        name: `${format}, at random`,
        args: (r) => [r.normal([7, 31], 2), format, r.integers([7, 31], 0, 2 ** 32, "u32")],
      })),
      { name: "no values", args: (r) => [r.normal([0, 4]), "e4m3fn", null] },
    ],
    errors: [
      {
        name: "random bits of another shape", message: /encode_elements.*random.*\[4\].*\[5\]/,
        args: (r) => [r.normal([4]), "e2m1", r.integers([5], 0, 9, "u32")],
      },
      {
        name: "random powers of two", message: /encode_elements: e8m0 is not rounded at random/,
        args: (r) => [r.normal([4]), "e8m0", r.integers([4], 0, 9, "u32")],
      },
    ],
  }),
  opSamples({
    op: decode_elements, reference: ref.decode_elements,
    samples: FORMATS.map((format): Sample => ({
      name: format, tolerance: 0,
      args: (r) => {
        const count = Math.min(2 ** BITS[format], 256);
        return [r.of([count], Array.from({ length: count }, (_, i) => i), "u32"), format];
      },
    })),
  }),
  opSamples({
    op: exact_arithmetic, reference: ref.exact_arithmetic,
    samples: (["divide", "multiply"] as const).map((operation): Sample => ({
      name: operation, tolerance: 0,
      args: (r) => {
        const x = r.of([EDGES.length * EDGES.length], EDGES.flatMap((value) => EDGES.map(() => value)));
        const y = r.of([EDGES.length * EDGES.length], EDGES.flatMap(() => EDGES));
        return [x, y, operation];
      },
    })),
    errors: [{
      name: "two shapes", args: (r) => [r.normal([3]), r.normal([4]), "divide"],
      message: /exact_arithmetic.*y.*\[3\].*\[4\]/,
    }],
  }),
];
