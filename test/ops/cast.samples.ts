import { cast } from "../../src/ops/cast.ts";
import * as ref from "../../src/reference/cast.ts";
import { type Draw, opSamples } from "./suite.ts";

const shapes: Record<string, number[]> = {
  "no elements": [0, 3], "one element": [1], "an odd size": [3, 5, 7], "several workgroups": [3, 1373],
};
/** Ties, subnormals, the largest finite values and what lies beyond. */
const EDGES = [
  0, -0, 1, -1, 1 + 2 ** -11, 1 + 3 * 2 ** -11, 1 + 2 ** -8, 1 + 3 * 2 ** -8, -1 - 2 ** -9, 65504, 65519,
    65520,
  -65520, 1e6, -1e30, 2 ** -14, 2 ** -14 - 2 ** -25, 2 ** -24, 2 ** -25, 3 * 2 ** -25, 5e-7, -6e-8, 1e-20,
  3.3e38, -3.3895313892515355e38,
];

export default opSamples({
  op: cast, reference: ref.cast, vjp: ref.cast_vjp, straightThrough: true,
  samples: [
    ...(["f16", "bf16"] as const).flatMap((half) => [
      ...Object.entries(shapes).flatMap(([name, shape]) => [
        { name: `f32 to ${half}, ${name}`, args: (r: Draw) => [r.normal(shape), half], tolerance: 0 },
        { name: `${half} to f32, ${name}`, args: (r: Draw) => [r.half(r.normal(shape), half), "f32"],
          tolerance: 0 },
      ]),
      { name: `edges of ${half}`, args: (r: Draw) => [r.of([EDGES.length], EDGES), half], tolerance: 0 },
      {
        name: `edges in ${half}`, tolerance: 0,
        args: (r: Draw) => [r.half(r.of([EDGES.length], EDGES.map((x) => x / 4)), half), "f32"],
      },
    ]),
    { name: "f16 to bf16", args: (r) => [r.half(r.normal([9, 5]), "f16"), "bf16"], tolerance: 0 },
    { name: "f32 to f32", args: (r) => [r.normal([9, 5]), "f32"], tolerance: 0 },
  ],
  errors: [
    {
      name: "an integer format", args: (r) => [r.normal([4]), "i32"],
      message: /cast: the format must be f32, f16 or bf16, found i32/,
    },
  ],
});
