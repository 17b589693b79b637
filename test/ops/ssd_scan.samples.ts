import { ssd_scan } from "../../src/ops/ssd_scan.ts";
import { ssd_scan as reference, ssd_scan_vjp } from "../../src/reference/ssd_scan.ts";
import type { NdArray } from "../../src/tensor/ndarray.ts";
import type { Tensor } from "../../src/tensor/tensor.ts";
import { documents, type Sizes, sizes } from "./chunks.ts";
import { type Draw, opSamples } from "./suite.ts";

type Seven<T> = [x: T, dt_raw: T, A_log: T, B: T, C: T, D: T, dt_bias: T];
type Limit = readonly [number, number];
type Arguments<T> = [
  initial_state: T | null, seq_idx: T | null, chunk_size: number, dt_limit: Limit, ...seven: Seven<T>,
];

// The suite gives gradients for positional arguments; the tensors among ssd_scan's options become such here.
const op = Object.assign(
  (...[initial_state, seq_idx, chunk_size, dt_limit, ...seven]: Arguments<Tensor>) =>
    ssd_scan(...seven, { chunk_size, dt_limit, initial_state, seq_idx }),
  { opName: "ssd_scan", mutates: [], differentiable: true },
);

function args(r: Draw, s: Sizes, initial: boolean, length?: number, limit: Limit = [0, Infinity]): unknown[] {
  return [
    initial ? r.normal([s.B, s.H, s.P, s.N]) : null, length === undefined ? null : documents(r, s, length),
    s.Q, limit, r.normal([s.B, s.L, s.H, s.P]), r.normal([s.B, s.L, s.H]), r.uniform([s.H], -1, 1.5),
    r.normal([s.B, s.L, s.G, s.N]), r.normal([s.B, s.L, s.G, s.N]), r.normal([s.H]), r.uniform([s.H], -3, 0),
  ];
}

export default opSamples({
  op,
  reference: (...[initial_state, seq_idx, chunk_size, dt_limit, ...seven]: Arguments<NdArray>) =>
    reference(...seven, { chunk_size, dt_limit, initial_state, seq_idx }),
  vjp: (
    grads: (NdArray | null)[], ...[initial_state, seq_idx, chunk_size, dt_limit, ...seven]: Arguments<NdArray>
  ) => {
    const gradients = ssd_scan_vjp(grads, ...seven, { chunk_size, dt_limit, initial_state, seq_idx });
    return [gradients[7], null, null, null, ...gradients.slice(0, 7)];
  },
  samples: [
    ...Object.entries(sizes).flatMap(([name, s]) => [
      { name, args: (r: Draw) => args(r, s, true), reduction: 1024 },
      { name: `${name}, documents`, args: (r: Draw) => args(r, s, true, 7), reduction: 1024 },
    ]),
    {
      name: "from nothing, clamped", reduction: 1024,
      args: (r) => args(r, sizes["odd sizes"]!, false, undefined, [0.05, 0.5]),
    },
    {
      name: "a training shape", reduction: 4096,
      args: (r) => args(r, { B: 1, L: 150, H: 4, P: 16, G: 2, N: 16, Q: 64 }, false, 40),
    },
  ],
});
