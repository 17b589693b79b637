import { chunk_state } from "../../src/ops/chunk_state.ts";
import { chunk_state as reference, chunk_state_vjp } from "../../src/reference/chunk_state.ts";
import { documents, type Sizes, sizes, steps } from "./chunks.ts";
import { type Draw, opSamples } from "./suite.ts";

function args(r: Draw, s: Sizes, length?: number): unknown[] {
  const seq_idx = length === undefined ? null : documents(r, s, length);
  return [r.normal([s.B, s.L, s.G, s.N]), r.normal([s.B, s.L, s.H, s.P]), ...steps(r, s), seq_idx];
}

export default opSamples({
  op: chunk_state,
  reference,
  vjp: chunk_state_vjp,
  samples: Object.entries(sizes).flatMap(([name, s]) => [
    { name, args: (r) => args(r, s), reduction: 256 },
    { name: `${name}, documents`, args: (r) => args(r, s, 6), reduction: 256 },
  ]),
  errors: [
    {
      name: "groups that do not divide the heads",
      args: (r) => [r.normal([1, 4, 3, 2]), r.normal([1, 4, 4, 2]), r.normal([1, 4, 1, 4]), r.normal([1, 4, 1, 4]), null],
      message: /chunk_state: B must be \[1, 4, ngroups, dstate\] with ngroups dividing 4, found \[1, 4, 3, 2\]/,
    },
    {
      name: "documents of another length",
      args: (r) => [...args(r, sizes["odd sizes"]!).slice(0, 4), r.integers([2, 22], 0, 2)],
      message: /chunk_state: seq_idx must be \[2, 23\], found \[2, 22\]/,
    },
  ],
});
