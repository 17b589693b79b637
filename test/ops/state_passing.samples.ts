import { state_passing } from "../../src/ops/state_passing.ts";
import { state_passing as reference, state_passing_vjp } from "../../src/reference/state_passing.ts";
import { documents, type Sizes, sizes, steps } from "./chunks.ts";
import { type Draw, opSamples } from "./suite.ts";

function args(r: Draw, s: Sizes, initial: boolean, length?: number): unknown[] {
  const seq_idx = length === undefined ? null : documents(r, s, length);
  return [
    r.normal([s.B, Math.ceil(s.L / s.Q), s.H, s.P, s.N]), steps(r, s)[1],
    initial ? r.normal([s.B, s.H, s.P, s.N]) : null, seq_idx,
  ];
}

export default opSamples({
  op: state_passing,
  reference,
  vjp: state_passing_vjp,
  samples: [
    ...Object.entries(sizes).flatMap(([name, s]) => [
      { name, args: (r: Draw) => args(r, s, true), reduction: 256 },
      { name: `${name}, documents`, args: (r: Draw) => args(r, s, true, 12), reduction: 256 },
    ]),
    { name: "from nothing", args: (r) => args(r, sizes["odd sizes"]!, false), reduction: 256 },
    {
      name: "from nothing, quads", reduction: 256,
      args: (r) => args(r, sizes["whole tiles and chunks"]!, false),
    },
    { name: "no chunks", args: (r) => args(r, { ...sizes["odd sizes"]!, L: 0 }, true) },
  ],
  errors: [
    {
      name: "an initial state of another size",
      args: (r) => [r.normal([1, 2, 2, 3, 4]), r.normal([1, 2, 2, 8]), r.normal([1, 2, 4, 3]), null],
      message: /state_passing: initial_state must be \[1, 2, 3, 4\], found \[1, 2, 4, 3\]/,
    },
    {
      name: "documents of another number of chunks",
      args: (r) => [r.normal([1, 2, 2, 3, 4]), r.normal([1, 2, 2, 8]), null, r.integers([1, 17], 0, 2)],
      message: /state_passing: seq_idx must be of 2 chunks of 8, found \[1, 17\]/,
    },
  ],
});
