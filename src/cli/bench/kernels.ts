/** The suite `kernels`: single ops, forward and backward, each against the bound that holds it back. */
import { Tape } from "../../autograd/tape.ts";
import { median } from "../../gpu/measure.ts";
import { attention } from "../../ops/attention.ts";
import { causal_conv1d } from "../../ops/causal_conv1d.ts";
import { decode_attention } from "../../ops/decode_attention.ts";
import { add, scale } from "../../ops/elementwise.ts";
import { gated_rms_norm } from "../../ops/gated_rms_norm.ts";
import { grouped_linear } from "../../ops/grouped_linear.ts";
import { linear } from "../../ops/linear.ts";
import { linear_cross_entropy } from "../../ops/linear_cross_entropy.ts";
import { matmul } from "../../ops/matmul.ts";
import { linear_packed } from "../../ops/packed_product.ts";
import { rms_norm } from "../../ops/rms_norm.ts";
import { quantize } from "../../ops/quantize.ts";
import { selective_state_update } from "../../ops/selective_state_update.ts";
import { softmax } from "../../ops/softmax.ts";
import { ssd_scan } from "../../ops/ssd_scan.ts";
import { bitsPerValue, type BlockFormat } from "../../tensor/blocks.ts";
import type { Tensor } from "../../tensor/tensor.ts";
import type { Bound } from "./line.ts";
import type { Bench } from "./runner.ts";

const SUITE = "kernels";
const MEGA = 2 ** 20;

interface KernelCase {
  readonly name: string;
  readonly by: Bound;
  /** Floating-point operations for "matmul", bytes read and written at least for "copy"; of one run. */
  readonly work: number;
  /** Makes the tensors; what it returns is timed. */
  prepare(make: (...shape: number[]) => Tensor, bench: Bench): () => unknown;
}

/** Forward and backward, with gradients for all of `inputs`. */
function bothWays(inputs: readonly Tensor[], forward: () => Tensor, dy: Tensor): () => void {
  for (const input of inputs) input.requiresGrad = true;
  return () => {
    const tape = new Tape();
    const y = tape.run(forward);
    for (const gradient of tape.backward([y], [dy]).values()) gradient.release();
  };
}

const [L, H, P, N, C] = [512, 16, 64, 128, 2048]; // of the scan and the convolution
const SSD = { chunk_size: 64, dt_limit: [0, Infinity], initial_state: null, seq_idx: null } as const;
const SSD_FLOPS = 5 * L * H * P * N;
const CAUSAL = { scale: 1 / 8, seq_idx: null } as const;
const attentionFlops = (tokens: number) => 4 * 8 * 64 * tokens * (tokens + 1) / 2;

function ssdInputs(make: (...shape: number[]) => Tensor) {
  return {
    x: make(1, L, H, P), dt: make(1, L, H), A_log: make(H), B: make(1, L, 1, N), C: make(1, L, 1, N),
    D: make(H), dt_bias: make(H),
  };
}

/** Formats of weights beside f32; one of each pair that costs the same. */
const PACKED: readonly BlockFormat[] = ["q8", "q4", "fp8_e4m3", "mxfp8_e4m3", "mxfp4", "nvfp4"];

/** Formats of both factors. */
const PACKED_BOTH: readonly BlockFormat[] = ["fp8_e4m3", "mxfp8_e4m3", "mxfp8_e5m2", "mxfp4", "nvfp4"];

const CASES: readonly KernelCase[] = [
  ...[512, 1024].map((n): KernelCase => ({
    name: `matmul_f32_${n}`, by: "matmul", work: 2 * n ** 3,
    prepare(make) {
      const [a, b] = [make(n, n), make(n, n)];
      return () => matmul(a, b, {});
    },
  })),
  {
    name: "linear_2048x384x128", by: "matmul", work: 2 * 2048 * 384 * 128,
    prepare(make) {
      const [x, w] = [make(2048, 128), make(384, 128)];
      return () => linear(x, w, null);
    },
  },
  {
    name: "linear_2048x384x128_both", by: "matmul", work: 6 * 2048 * 384 * 128,
    prepare(make) {
      const [x, w, dy] = [make(2048, 128), make(384, 128), make(2048, 384)];
      return bothWays([x, w], () => linear(x, w, null), dy);
    },
  },
  {
    name: "matvec_f32_4096", by: "copy", work: 4 * 4096 ** 2,
    prepare(make) {
      const [x, w] = [make(1, 4096), make(4096, 4096)];
      return () => linear(x, w, null);
    },
  },
  ...PACKED.map((format): KernelCase => ({
    name: `matvec_${format}_4096`, by: "copy", work: 4096 ** 2 * bitsPerValue(format) / 8,
    prepare(make, bench) {
      const x = make(1, 4096);
      const w = bench.own(quantize(make(4096, 4096), format));
      return () => linear(x, w, null);
    },
  })),
  {
    name: "linear_f32_512x1024x1024", by: "matmul", work: 2 * 512 * 1024 ** 2,
    prepare(make) {
      const [x, w] = [make(512, 1024), make(1024, 1024)];
      return () => linear(x, w, null);
    },
  },
  ...PACKED.map((format): KernelCase => ({
    name: `linear_${format}_512x1024x1024`, by: "matmul", work: 2 * 512 * 1024 ** 2,
    prepare(make, bench) {
      const x = make(512, 1024);
      const w = bench.own(quantize(make(1024, 1024), format));
      return () => linear(x, w, null);
    },
  })),
  {
    name: "copy_16m", by: "copy", work: 8 * 16 * MEGA,
    prepare(make) {
      const x = make(16 * MEGA);
      return () => scale(x, 2);
    },
  },
  {
    name: "add_4m", by: "copy", work: 12 * 4 * MEGA,
    prepare(make) {
      const [x, y] = [make(4 * MEGA), make(4 * MEGA)];
      return () => add(x, y);
    },
  },
  {
    name: "rms_norm_1024x4096", by: "copy", work: 8 * 4 * MEGA,
    prepare(make) {
      const [x, w] = [make(1024, 4096), make(4096)];
      return () => rms_norm(x, w, 1e-5);
    },
  },
  {
    // x in and y out; then x and dy in, dx out
    name: "rms_norm_1024x4096_both", by: "copy", work: 20 * 4 * MEGA,
    prepare(make) {
      const [x, w, dy] = [make(1024, 4096), make(4096), make(1024, 4096)];
      return bothWays([x, w], () => rms_norm(x, w, 1e-5), dy);
    },
  },
  {
    name: "gated_rms_norm_1024x4096", by: "copy", work: 12 * 4 * MEGA,
    prepare(make) {
      const [y, z, w] = [make(1024, 4096), make(1024, 4096), make(4096)];
      return () => gated_rms_norm(y, z, w, 8, 1e-5);
    },
  },
  {
    name: "softmax_1024x4096", by: "copy", work: 8 * 4 * MEGA,
    prepare(make) {
      const x = make(1024, 4096);
      return () => softmax(x);
    },
  },
  ...[512, 2048].map((tokens): KernelCase => ({
    name: `attention_${tokens}x8x64`, by: "matmul", work: attentionFlops(tokens),
    prepare(make) {
      const q = make(1, tokens, 8, 64);
      return () => attention(q, q, q, CAUSAL);
    },
  })),
  {
    // the backward pass has five products where the forward pass has two
    name: "attention_512x8x64_both", by: "matmul", work: 3.5 * attentionFlops(512),
    prepare(make) {
      const [q, k, v, dy] = [0, 1, 2, 3].map(() => make(1, 512, 8, 64)) as [Tensor, Tensor, Tensor, Tensor];
      return bothWays([q, k, v], () => attention(q, k, v, CAUSAL), dy);
    },
  },
  {
    name: "decode_attention_4096x8x64", by: "copy", work: 2 * 4 * 2 * 4096 * 64,
    prepare(make, bench) {
      const [q, k, v] = [make(1, 1, 8, 64), make(1, 2, 4096, 64), make(1, 2, 4096, 64)];
      const at = bench.own(bench.device.tensor([4095], [1], "u32"));
      return () => decode_attention(q, k, v, at, 1 / 8);
    },
  },
  {
    name: "ssd_512", by: "matmul", work: SSD_FLOPS,
    prepare(make) {
      const i = ssdInputs(make);
      return () => ssd_scan(i.x, i.dt, i.A_log, i.B, i.C, i.D, i.dt_bias, SSD);
    },
  },
  {
    name: "ssd_512_both", by: "matmul", work: 3 * SSD_FLOPS,
    prepare(make) {
      const i = ssdInputs(make);
      const inputs = Object.values(i);
      return bothWays(
        inputs, () => ssd_scan(i.x, i.dt, i.A_log, i.B, i.C, i.D, i.dt_bias, SSD)[0], make(1, L, H, P));
    },
  },
  {
    name: "ssd_step", by: "copy", work: 8 * H * P * N,
    prepare(make) {
      const [state, xBC, dt, A_log] = [make(1, H, P, N), make(1, H * P + 2 * N), make(1, H), make(H)];
      const [D, bias] = [make(H), make(H)];
      return () => selective_state_update(state, xBC, dt, A_log, D, bias, [0, Infinity]);
    },
  },
  {
    name: "conv_silu_512", by: "copy", work: 8 * L * C,
    prepare(make) {
      const [x, w, b] = [make(1, L, C), make(C, 4), make(C)];
      return () => causal_conv1d(x, w, b, null, null);
    },
  },
  {
    name: "conv_silu_512_both", by: "copy", work: 20 * L * C,
    prepare(make) {
      const [x, w, b, dy] = [make(1, L, C), make(C, 4), make(C), make(1, L, C)];
      return bothWays([x, w, b], () => causal_conv1d(x, w, b, null, null)[0]!, dy);
    },
  },
  {
    name: "cross_entropy_512x256x4096_both", by: "matmul", work: 6 * 512 * 256 * 4096,
    prepare(make, bench) {
      const [h, w] = [make(512, 256), make(4096, 256)];
      const numbers = Int32Array.from({ length: 512 }, (_, i) => (i * 37) % 4096);
      const labels = bench.own(bench.device.tensor(numbers, [512]));
      const seed = bench.own(bench.device.tensor([1], []));
      return bothWays([h, w], () => linear_cross_entropy(h, w, labels, {}), seed);
    },
  },
];

export async function benchKernels(bench: Bench): Promise<void> {
  const { device } = bench;
  for (const { name, by, work, prepare } of CASES) {
    if (!bench.wants(SUITE, name)) continue;
    const body = prepare((...shape) => bench.tensor(shape), bench);
    const times = await bench.time(body);
    bench.freeTensors();
    device.pool.trim();
    const unit = by === "copy" ? "GB/s" : "GFLOP/s";
    await bench.add({ suite: SUITE, case: name, times, unit, work, bound: { by, work } });
  }
  await packedBoth(bench);
  await grouped(bench);
}

/** Products of two packed factors, beside that of f32. */
async function packedBoth(bench: Bench): Promise<void> {
  const [m, n, k] = [512, 1024, 1024];
  const work = 2 * m * n * k;
  for (const format of PACKED_BOTH) {
    const name = `linear_both_${format}_${m}x${n}x${k}`;
    if (!bench.wants(SUITE, name)) continue;
    const [x, w] = [bench.tensor([m, k]), bench.tensor([n, k])];
    const [packedX, packedW] = [bench.own(quantize(x, format)), bench.own(quantize(w, format))];
    const { times, other, ratio } = await bench.timePair(
      () => linear_packed(packedX, packedW), () => linear(x, w, null));
    bench.freeTensors();
    await bench.add({
      suite: SUITE, case: name, times, unit: "GFLOP/s", work, bound: { by: "matmul", work },
      details: { f32_ms: median(other), share_of_f32: 1 / ratio },
      remark: `${Math.round(100 / ratio)} % of f32`,
    });
  }
}

/** 16 experts with 64 rows each, beside one product over as many rows. */
async function grouped(bench: Bench): Promise<void> {
  const [experts, rows, K, width] = [16, 64, 512, 512];
  const work = 2 * experts * rows * K * width;
  for (const both of [false, true]) {
    const name = `grouped_16x64x512${both ? "_both" : ""}`;
    if (!bench.wants(SUITE, name)) continue;
    const x = bench.tensor([experts * rows, K]);
    const w = bench.tensor([experts, width, K]);
    const dense = bench.tensor([width, K]);
    const dy = bench.tensor([experts * rows, width]);
    const starts = Uint32Array.from({ length: experts + 1 }, (_, e) => e * rows);
    const offsets = bench.own(bench.device.tensor(starts, [experts + 1]));
    const pair = [() => grouped_linear(x, w, offsets), () => linear(x, dense, null)] as const;
    const [a, b] = both ? [bothWays([x, w], pair[0], dy), bothWays([x, dense], pair[1], dy)] : pair;
    const { times, other, ratio } = await bench.timePair(a, b);
    bench.freeTensors();
    const flops = both ? 3 * work : work;
    await bench.add({
      suite: SUITE, case: name, times, unit: "GFLOP/s", work: flops, bound: { by: "matmul", work: flops },
      details: { dense_ms: median(other), share_of_dense: 1 / ratio },
      remark: `${Math.round(100 / ratio)} % of one dense product`,
    });
  }
}
