/**
 * The float64 references of the scan: the chunked form against the recurrence, and both against numbers
 * computed elsewhere (a 7-position mixer core: convolution, scan with an initial state, gated grouped
 * RMSNorm; values and gradients).
 */
import { describe, expect, test } from "vitest";
import { bmm_chunk, bmm_chunk_vjp } from "../../src/reference/bmm_chunk.ts";
import { causal_conv1d, causal_conv1d_vjp } from "../../src/reference/causal_conv1d.ts";
import { chunk_cumsum, chunk_cumsum_vjp } from "../../src/reference/chunk_cumsum.ts";
import { chunk_scan, chunk_scan_vjp } from "../../src/reference/chunk_scan.ts";
import { chunk_state, chunk_state_vjp } from "../../src/reference/chunk_state.ts";
import { selective_state_update } from "../../src/reference/selective_state_update.ts";
import { ssd_scan, ssd_scan_vjp, type SsdScanOptions } from "../../src/reference/ssd_scan.ts";
import { state_passing, state_passing_vjp } from "../../src/reference/state_passing.ts";
import { type NdArray, ndarray } from "../../src/tensor/ndarray.ts";

type Seven = [
  x: NdArray, dt_raw: NdArray, A_log: NdArray, B: NdArray, C: NdArray, D: NdArray, dt_bias: NdArray,
];

/** The generator the published numbers were made with: value * scale + offset, value uniform in [-1, 1). */
function generator(seed: number) {
  let s = seed;
  return (shape: readonly number[], scale: number, offset: number): NdArray => {
    const array = ndarray(shape);
    array.data.forEach((_, i) => {
      s = (Math.imul(1664525, s) + 1013904223) >>> 0;
      array.data[i] = (2 * (s / 2 ** 32) - 1) * scale + offset;
    });
    return array;
  };
}

/** The scan in its five parts, and the gradients of all its arguments. */
function chunked(seven: Seven, options: SsdScanOptions, dy: NdArray, dfinal: NdArray) {
  const [x, dt_raw, A_log, B, C, D, dt_bias] = seven;
  const { chunk_size, dt_limit, initial_state, seq_idx } = options;
  const [dt, a] = chunk_cumsum(dt_raw, A_log, dt_bias, chunk_size, dt_limit);
  const states = chunk_state(B, x, dt, a, seq_idx);
  const [prev, final_state] = state_passing(states, a, initial_state, seq_idx);
  const CB = bmm_chunk(C, B, chunk_size);
  const y = chunk_scan(CB, x, dt, a, C, prev, D, seq_idx);

  const [dCB, dx1, ddt1, da1, dC1, dprev, dD] = chunk_scan_vjp([dy], CB, x, dt, a, C, prev, D, seq_idx);
  const [dC2, dB1] = bmm_chunk_vjp([dCB!], C, B, chunk_size);
  const [dstates, da2, dinitial] = state_passing_vjp([dprev!, dfinal], states, a, initial_state, seq_idx);
  const [dB2, dx2, ddt2, da3] = chunk_state_vjp([dstates!], B, x, dt, a, seq_idx);
  const dsteps = [add(ddt1!, ddt2!), add(da1!, da2!, da3!)];
  const [ddt_raw, dA_log, ddt_bias] = chunk_cumsum_vjp(dsteps, dt_raw, A_log, dt_bias, chunk_size, dt_limit);
  return {
    outputs: [y, final_state],
    gradients: [
      add(dx1!, dx2!), ddt_raw!, dA_log!, add(dB1!, dB2!), add(dC1!, dC2!), dD!, ddt_bias!, dinitial,
    ],
  };
}

function add(...arrays: NdArray[]): NdArray {
  const total = (i: number) => arrays.reduce((sum, array) => sum + array.data[i]!, 0);
  return ndarray(arrays[0]!.shape, arrays[0]!.data.map((_, i) => total(i)));
}

function expectEqual(found: NdArray, expected: NdArray): void {
  expect(found.shape).toEqual(expected.shape);
  const scale = expected.data.reduce((m, v) => Math.max(m, Math.abs(v)), 1e-3);
  found.data.forEach((v, i) => expect(Math.abs(v - expected.data[i]!) / scale).toBeLessThan(1e-12));
}

describe("chunked form and recurrence agree", () => {
  const fill = generator(77);
  const [batch, L, H, P, G, N] = [2, 19, 4, 3, 2, 5];
  const seven: Seven = [
    fill([batch, L, H, P], 1, 0), fill([batch, L, H], 2, 0), fill([H], 0.7, 0.7),
    fill([batch, L, G, N], 1, 0), fill([batch, L, G, N], 1, 0), fill([H], 1, 0), fill([H], 1, -1),
  ];
  const initial_state = fill([batch, H, P, N], 1, 0);
  const dy = fill([batch, L, H, P], 1, 0);
  const dfinal = fill([batch, H, P, N], 1, 0);
  const documents = ndarray([batch, L], [
    5, 5, 5, 2, 2, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 0, 0, 0,
    1, 1, 1, 1, 1, 1, 1, 9, 9, 9, 9, 9, 9, 9, 9, 4, 3, 4, 4,
  ]);
  for (const chunk_size of [1, 3, 7, 16]) {
    for (const seq_idx of [null, documents]) {
      for (const dt_limit of [[0, Infinity], [0.2, 0.6]] as const) {
        test(`chunks of ${chunk_size}${seq_idx ? ", documents" : ""}, dt in [${dt_limit}]`, () => {
          const options = { chunk_size, dt_limit, initial_state, seq_idx };
          const parts = chunked(seven, options, dy, dfinal);
          ssd_scan(...seven, options).forEach((expected, i) => expectEqual(parts.outputs[i]!, expected));
          ssd_scan_vjp([dy, dfinal], ...seven, options)
            .forEach((expected, i) => expectEqual(parts.gradients[i]!, expected!));
        });
      }
    }
  }

  test("decode steps from the initial state", () => {
    const options = { chunk_size: 4, dt_limit: [0, Infinity] as const, initial_state, seq_idx: null };
    const [y, final_state] = ssd_scan(...seven, options);
    const state = ndarray(initial_state.shape, initial_state.data.slice());
    for (let t = 0; t < L; t++) {
      const at = (array: NdArray) => {
        const [, , ...rest] = array.shape;
        const width = rest.reduce((a, b) => a * b, 1);
        const row = (b: number) => [...array.data.subarray((b * L + t) * width, (b * L + t + 1) * width)];
        return ndarray([batch, ...rest], [0, 1].flatMap(row));
      };
      const [x, dt_raw, A_log, B, C, D, dt_bias] = seven;
      const rows = Array.from({ length: batch }, (_, b) => [x, B, C].flatMap((array) => {
        const width = array.data.length / (batch * L);
        return [...array.data.subarray((b * L + t) * width, (b * L + t + 1) * width)];
      }));
      const xBC = ndarray([batch, rows[0]!.length], rows.flat());
      expectEqual(selective_state_update(state, xBC, at(dt_raw), A_log, D, dt_bias, options.dt_limit), at(y));
    }
    expectEqual(state, final_state);
  });

  test("documents in one row equal documents in rows of their own", () => {
    const cut = (array: NdArray, from: number, to: number) => {
      const width = array.data.length / (batch * L);
      return ndarray([1, to - from, ...array.shape.slice(2)], array.data.slice(from * width, to * width));
    };
    const options = { chunk_size: 4, dt_limit: [0, Infinity] as const, initial_state: null };
    const [y] = ssd_scan(...seven, { ...options, seq_idx: documents });
    for (const [from, to] of [[0, 3], [3, 5], [5, 16], [16, 19]] as const) {
      const [x, dt_raw, A_log, B, C, D, dt_bias] = seven;
      const own = (array: NdArray) => cut(array, from, to);
      const alone: Seven = [own(x), own(dt_raw), A_log, own(B), own(C), D, dt_bias];
      const [part] = ssd_scan(...alone, { ...options, seq_idx: null });
      expectEqual(part, own(y));
    }
  });
});

describe("a mixer core with known numbers", () => {
  const [T, nh, P, G, N, K, inner, C] = [7, 4, 3, 2, 2, 4, 12, 20];
  const eps = 1e-5;
  const fill = generator(12345);
  const proj = fill([T, 36], 1, 0);
  const cw = fill([C, K], 0.5, 0);
  const cb = fill([C], 0.1, 0);
  const dt_bias = fill([nh], 0.5, -1);
  const A_log = fill([nh], 0.5, 0.5);
  const D = fill([nh], 0.2, 1);
  const nw = fill([inner], 0.1, 1);
  const S0 = fill([1, nh, P, N], 0.3, 0);
  const Wo = fill([T, inner], 1, 0);
  const Ws = fill([1, nh, P, N], 1, 0);

  const columns = (array: NdArray, from: number, to: number, shape: readonly number[]) => {
    const width = array.shape.at(-1)!;
    return ndarray(shape, array.data.filter((_, i) => i % width >= from && i % width < to));
  };
  const z = columns(proj, 0, inner, [T, inner]);
  const xBC = columns(proj, inner, inner + C, [1, T, C]);
  const dt_raw = columns(proj, inner + C, 36, [1, T, nh]);
  const [u] = causal_conv1d(xBC, cw, cb, null, null);
  const seven: Seven = [
    columns(u, 0, inner, [1, T, nh, P]), dt_raw, A_log, columns(u, inner, inner + G * N, [1, T, G, N]),
    columns(u, inner + G * N, C, [1, T, G, N]), D, dt_bias,
  ];
  const options = { chunk_size: 4, dt_limit: [0, Infinity] as const, initial_state: S0, seq_idx: null };
  const [y, S] = ssd_scan(...seven, options);

  // o = v / sqrt(mean_group(v^2) + eps) * w with v = y silu(z), and its backward for do = Wo.
  const sigmoid = (v: number) => 1 / (1 + Math.exp(-v));
  const out = ndarray([T, inner]);
  const dy = ndarray([1, T, nh, P]);
  const dz = ndarray([T, inner]);
  const dnw = ndarray([inner]);
  for (let t = 0; t < T; t++) {
    for (let g = 0; g < G; g++) {
      const at = Array.from({ length: inner / G }, (_, i) => t * inner + g * (inner / G) + i);
      const v = at.map((i) => y.data[i]! * z.data[i]! * sigmoid(z.data[i]!));
      const rho = 1 / Math.sqrt(v.reduce((sum, value) => sum + value * value, 0) / v.length + eps);
      const gamma = at.map((i) => Wo.data[i]! * nw.data[i % inner]!);
      const mean = v.reduce((sum, value, k) => sum + gamma[k]! * rho * value, 0) / v.length;
      at.forEach((i, k) => {
        const s = sigmoid(z.data[i]!);
        const dv = rho * (gamma[k]! - rho * v[k]! * mean);
        out.data[i] = rho * v[k]! * nw.data[i % inner]!;
        dnw.data[i % inner]! += Wo.data[i]! * rho * v[k]!;
        dy.data[i] = dv * z.data[i]! * s;
        dz.data[i] = dv * y.data[i]! * s * (1 + z.data[i]! * (1 - s));
      });
    }
  }
  const loss = [...out.data].reduce((sum, v, i) => sum + v * Wo.data[i]!, 0) +
    [...S.data].reduce((sum, v, i) => sum + v * Ws.data[i]!, 0);

  const expectValues = (found: readonly number[], expected: readonly number[]) => {
    expected.forEach((value, i) => expect(found[i]).toBeCloseTo(value, 9));
  };

  test("inputs", () => {
    expectValues([...proj.data], [-0.9591946285, -0.9669043035, 0.086311589, 0.2698081122]);
    expectValues(Array.from(proj.data.slice(-4)), [-0.065408932, -0.3304764279, 0.1959583377, 0.0242735394]);
  });

  test("convolution, steps and outputs", () => {
    expectValues([...u.data], [-0.0254923372, 0.2156002552, -0.040787426, 0.0125358099]);
    expectValues(Array.from(u.data.slice(6 * C + inner)), [
      -0.2215369484, -0.0095492657, -0.0739864915, -0.0815868722,
      -0.0483254108, -0.2306995966, -0.154652061, -0.1806523054,
    ]);
    const [dt] = chunk_cumsum(dt_raw, A_log, dt_bias, 1, [0, Infinity]); // [1,H,T,1]
    const first = [0, 1, 2, 3].map((h) => dt.data[h * T]!);
    expectValues(first, [0.343525255, 0.1821108224, 0.4101997996, 0.6291525966]);
    expectValues([...A_log.data].map((v) => -Math.exp(v)), [
      -1.4473341621, -1.0042200124, -2.1649842944, -1.177230982,
    ]);
    expectValues([...y.data], [-0.0806327176, 0.2129500824, -0.0199057083, 0.0529339913]);
    expectValues(Array.from(y.data.slice(6 * inner)), [
      0.0255721396, -0.1290077093, -0.1685579414, 0.1244754617, -0.1230495083, 0.1715187867,
    ]);
    expectValues([...out.data], [0.8784463656, -2.0575870731, -0.0370480288, 0.2855189568]);
    expectValues(Array.from(out.data.slice(6 * inner)), [
      -0.1196069794, -0.0808742096, -2.4214386009, 0.5917060129, 0.4171257738, -0.485984824,
      -1.0792261148, 0.1028510947, -1.4084912823, -0.0115082638, 1.6775712169, -0.2333417084,
    ]);
    expectValues([...S.data], [
      -0.0062053931, -0.00659762, 0.0146694681, 0.0057388312, 0.0194302847, -0.0033227292,
    ]);
    expectValues(Array.from(S.data.slice(18)), [
      0.0006408994, 0.0001298479, 0.0046203071, -0.0123185201, 0.0135391254, -0.0005856185,
    ]);
    expect(loss).toBeCloseTo(2.5170806351131083, 12);
  });

  for (const form of ["recurrence", "chunks of 1", "chunks of 3", "chunks of 7", "chunks of 16"]) {
    test(`gradients by ${form}`, () => {
      const gradients = form === "recurrence"
        ? ssd_scan_vjp([dy, Ws], ...seven, options)
        : chunked(seven, { ...options, chunk_size: Number(form.slice(10)) }, dy, Ws).gradients;
      const [dx, ddt, dA_log, dB, dC, dD, ddt_bias, dS0] = gradients as NdArray[];
      const du = ndarray([1, T, C]);
      const dproj = ndarray([T, 36]);
      for (let t = 0; t < T; t++) {
        du.data.set(dx!.data.subarray(t * inner, (t + 1) * inner), t * C);
        du.data.set(dB!.data.subarray(t * G * N, (t + 1) * G * N), t * C + inner);
        du.data.set(dC!.data.subarray(t * G * N, (t + 1) * G * N), t * C + inner + G * N);
      }
      const [dxBC, dcw, dcb] = causal_conv1d_vjp([du, null], xBC, cw, cb, null, null) as NdArray[];
      for (let t = 0; t < T; t++) {
        dproj.data.set(dz.data.subarray(t * inner, (t + 1) * inner), t * 36);
        dproj.data.set(dxBC!.data.subarray(t * C, (t + 1) * C), t * 36 + inner);
        dproj.data.set(ddt!.data.subarray(t * nh, (t + 1) * nh), t * 36 + inner + C);
      }
      const expectGradient = (gradient: NdArray, sum: number, absolute: number, first: readonly number[]) => {
        expect(gradient.data.reduce((a, b) => a + b, 0)).toBeCloseTo(sum, 10);
        expect(gradient.data.reduce((a, b) => a + Math.abs(b), 0)).toBeCloseTo(absolute, 10);
        expectValues([...gradient.data], first);
      };
      expectGradient(dproj, -31.098828567844365, 142.74773447714924, [
        -0.0138352487, 0.0212365594, 0.2219073466, -0.3986764942,
      ]);
      expectGradient(dcw!, 25.822232840463112, 132.7670148957813, [
        -1.9048039698, 4.9396367266, -4.7352981366, 1.9893876032,
      ]);
      expectGradient(dcb!, 8.709880657220886, 135.89721515832522, [
        -5.6434130995, -1.8052665241, -2.8128391748, -2.6723842844,
      ]);
      expectGradient(ddt_bias!, -0.24616355422087777, 0.7076103319546292, [
        0.1813166473, -0.1128589793, 0.0494067416, -0.3640279638,
      ]);
      expectGradient(dA_log!, -0.2635210145178907, 0.924252288470107, [
        0.2441403179, -0.1186055363, 0.0862253191, -0.4752811152,
      ]);
      expectGradient(dD!, 0.2905597240320379, 8.830611111346968, [
        0.7032109095, -0.435878579, -3.8341471147, 3.8573745082,
      ]);
      expectGradient(dnw, 2.131944594524156, 13.51565050779779, [
        0.1732141992, 0.0051162133, 2.1979808179, -1.6602291376,
      ]);
      expectGradient(dS0!, 2.440962585630993, 11.476656836816035, [
        0.4489899908, 0.2928465809, -0.0034842479, -0.0193592875,
      ]);
    });
  }
});
