import { selective_state_update } from "../../src/ops/selective_state_update.ts";
import { selective_state_update as reference } from "../../src/reference/selective_state_update.ts";
import type { NdArray } from "../../src/tensor/ndarray.ts";
import { type Draw, opSamples } from "./suite.ts";

type Arguments = Parameters<typeof reference>;

function args(
  r: Draw, B: number, H: number, P: number, G: number, N: number, limit = [0, Infinity],
): unknown[] {
  return [
    r.normal([B, H, P, N]), r.normal([B, H * P + 2 * G * N]), r.normal([B, H]), r.uniform([H], -1, 2),
    r.normal([H]), r.uniform([H], -3, 0), limit,
  ];
}

export default opSamples({
  op: selective_state_update,
  reference: (state: NdArray, ...rest: Arguments extends [unknown, ...infer R] ? R : never) =>
    [reference(state, ...rest), state],
  samples: [
    { name: "quads", args: (r) => args(r, 2, 4, 8, 2, 16) },
    { name: "odd sizes", args: (r) => args(r, 3, 6, 5, 3, 7) },
    { name: "batch of one", args: (r) => args(r, 1, 2, 3, 1, 4) },
    { name: "a wide state", args: (r) => args(r, 1, 2, 64, 1, 128), reduction: 128 },
    { name: "eight rows at a time, a state of six quads", args: (r) => args(r, 2, 2, 16, 2, 24) },
    { name: "quads of the state, not of the rows", args: (r) => args(r, 1, 2, 3, 1, 8) },
    { name: "clamped", args: (r) => args(r, 2, 4, 4, 1, 4, [0.1, 0.3]) },
    { name: "no rows", args: (r) => args(r, 0, 2, 4, 1, 4) },
  ],
  errors: [
    {
      name: "groups that do not divide the heads",
      args: (r) => args(r, 1, 2, 3, 1, 4).with(1, r.normal([1, 6 + 2 * 3 * 4])),
      message: /selective_state_update: xBC must be \[1, 6 \+ 2 ngroups 4\] with .* 2, found \[1, 30\]/,
    },
  ],
});
