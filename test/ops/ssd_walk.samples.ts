import { ssd_walk } from "../../src/ops/ssd_walk.ts";
import { ssd_scan as reference, ssd_scan_vjp } from "../../src/reference/ssd_scan.ts";
import type { NdArray } from "../../src/tensor/ndarray.ts";
import { documents, type Sizes } from "./chunks.ts";
import { type Draw, opSamples } from "./suite.ts";

type Seven = [NdArray, NdArray, NdArray, NdArray, NdArray, NdArray, NdArray];
type Limit = readonly [number, number];
type Arguments = [...seven: Seven, initial_state: NdArray | null, seq_idx: NdArray | null, dt_limit: Limit];
type Shape = Omit<Sizes, "Q">;

interface Extra {
  readonly initial?: boolean;
  /** Mean length of documents; none without it. */
  readonly length?: number;
  readonly limit?: Limit;
  /** Range of A_log. */
  readonly A_log?: readonly [number, number];
}

function args(r: Draw, s: Shape, extra: Extra): unknown[] {
  const { initial, length, limit = [0, Infinity], A_log = [-1, 1.5] } = extra;
  return [
    r.normal([s.B, s.L, s.H, s.P]), r.normal([s.B, s.L, s.H]), r.uniform([s.H], ...A_log),
    r.normal([s.B, s.L, s.G, s.N]), r.normal([s.B, s.L, s.G, s.N]), r.normal([s.H]), r.uniform([s.H], -3, 0),
    initial ? r.normal([s.B, s.H, s.P, s.N]) : null,
    length === undefined ? null : documents(r, s, length), limit,
  ];
}

function sample(name: string, shape: Shape, extra: Extra = {}) {
  return { name, args: (r: Draw) => args(r, shape, extra), reduction: 1024 };
}

const odd: Shape = { B: 2, L: 23, H: 6, P: 12, G: 3, N: 16 };

export default opSamples({
  op: ssd_walk, needs: "subgroups",
  reference: (...[x, dt_raw, A_log, B, C, D, dt_bias, initial_state, seq_idx, dt_limit]: Arguments) =>
    reference(x, dt_raw, A_log, B, C, D, dt_bias, { chunk_size: 1, dt_limit, initial_state, seq_idx }),
  vjp: (
    grads: (NdArray | null)[],
    ...[x, dt_raw, A_log, B, C, D, dt_bias, initial_state, seq_idx, dt_limit]: Arguments
  ) => ssd_scan_vjp(
    grads, x, dt_raw, A_log, B, C, D, dt_bias, { chunk_size: 1, dt_limit, initial_state, seq_idx }),
  samples: [
    sample("whole blocks and tiles", { B: 2, L: 16, H: 4, P: 16, G: 2, N: 32 }, { initial: true }),
    sample("tiles that stick out", odd, { initial: true }),
    sample("tiles that stick out, documents", odd, { initial: true, length: 7 }),
    sample("documents of one or two tokens", { B: 2, L: 40, H: 2, P: 4, G: 1, N: 16 }, { length: 1.5 }),
    sample(
      "three slices of the state, wide tiles", { B: 1, L: 9, H: 2, P: 40, G: 1, N: 80 }, { initial: true }),
    sample("from nothing, clamped", odd, { limit: [0.05, 0.5] }),
    sample("more than a chunk", { B: 1, L: 150, H: 4, P: 16, G: 2, N: 16 }, { initial: true, length: 40 }),
    sample("decays to nothing", { B: 1, L: 70, H: 2, P: 8, G: 1, N: 16 }, { A_log: [4, 6] }),
    sample("hardly any decay", { B: 1, L: 70, H: 2, P: 8, G: 1, N: 16 }, { A_log: [-9, -7], initial: true }),
    sample("more pieces than a launch takes", { B: 1, L: 6, H: 34, P: 4, G: 1, N: 16 }),
    sample("one token", { B: 2, L: 1, H: 2, P: 4, G: 1, N: 16 }, { initial: true }),
    sample("no rows", { B: 0, L: 9, H: 2, P: 4, G: 1, N: 16 }),
    sample("no tokens", { B: 2, L: 0, H: 2, P: 4, G: 1, N: 16 }, { initial: true }),
  ],
  errors: [
    {
      name: "a head of odd width", args: (r) => args(r, { ...odd, P: 6 }, {}),
      message: /ssd_walk: x must be of a headdim that is a multiple of 4, found \[2, 23, 6, 6\]/,
    },
    {
      name: "C of another size", args: (r) => args(r, odd, {}).with(4, r.normal([2, 23, 3, 32])),
      message: /ssd_walk: C must be \[2, 23, 3, 16\], found \[2, 23, 3, 32\]/,
    },
  ],
});
