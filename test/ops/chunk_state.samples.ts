import { chunk_state } from "../../src/ops/chunk_state.ts";
import { chunk_state as reference, chunk_state_vjp } from "../../src/reference/chunk_state.ts";
import { documents, type Sizes, sizes, steps } from "./chunks.ts";
import { type Draw, opSamples } from "./suite.ts";

function args(r: Draw, s: Sizes, length?: number, strongest?: number): unknown[] {
  const seq_idx = length === undefined ? null : documents(r, s, length);
  return [r.normal([s.B, s.L, s.G, s.N]), r.normal([s.B, s.L, s.H, s.P]), ...steps(r, s, strongest), seq_idx];
}

export default opSamples({
  op: chunk_state,
  reference,
  vjp: chunk_state_vjp,
  samples: [
    ...Object.entries(sizes).flatMap(([name, s]) => [
      { name, args: (r: Draw) => args(r, s), reduction: 256 },
      { name: `${name}, documents`, args: (r: Draw) => args(r, s, 6), reduction: 256 },
    ]),
    {
      name: "decay to nothing within a chunk", reduction: 256,
      args: (r) => args(r, { B: 1, L: 40, H: 3, P: 4, G: 1, N: 4, Q: 40 }, undefined, 400),
    },
  ],
  errors: [
    {
      name: "groups that do not divide the heads",
      args: (r) => args(r, { B: 1, L: 4, H: 4, P: 2, G: 3, N: 2, Q: 4 }),
      message: /chunk_state: B must be \[1, 4, ngroups, dstate\] with ngroups dividing 4, found \[1, 4, 3, 2/,
    },
    {
      name: "documents of another length",
      args: (r) => args(r, sizes["odd sizes"]!).with(4, r.integers([2, 22], 0, 2)),
      message: /chunk_state: seq_idx must be \[2, 23\], found \[2, 22\]/,
    },
  ],
});
