/**
 * The suite `overhead`: what the engine itself costs. Replayed launches beside hand-written WebGPU calls, and
 * the time of the host.
 */
import { Generator } from "../../infer/engine.ts";
import type { NemotronH } from "../../models/nemotron_h.ts";
import { scale } from "../../ops/elementwise.ts";
import type { Device } from "../../tensor/device.ts";
import { scope } from "../../tensor/scope.ts";
import type { Tensor } from "../../tensor/tensor.ts";
import type { Bench } from "./runner.ts";

const SUITE = "overhead";
const LAUNCHES = 1000;
const WARMUP = 3;

export async function benchOverhead(bench: Bench): Promise<void> {
  const name = `replay_${LAUNCHES}`;
  if (!bench.wants(SUITE, name)) return;
  const { times, hand_ms, ratio, replay_host_ms, hand_host_ms } =
    await replayOverhead(bench.device, bench.options.runs);
  await bench.add({
    suite: SUITE, case: name, times, unit: "us", work: LAUNCHES,
    details: { hand_ms, ratio, replay_host_ms, hand_host_ms },
    remark: `${ratio.toFixed(2)}x the time of plain WebGPU calls`,
  });
}

export interface ReplayOverhead {
  /** Milliseconds of every run of the replay, the smallest first. */
  readonly times: readonly number[];

  /** Median milliseconds of 1000 tiny dispatches, waited for: a captured graph's replay, and by hand. */
  readonly replay_ms: number;
  readonly hand_ms: number;
  /** replay_ms / hand_ms, the median over pairs that ran one after the other. */
  readonly ratio: number;
  /** Milliseconds until the call returned, without waiting for the GPU. */
  readonly replay_host_ms: number;
  readonly hand_host_ms: number;
}

/** 1000 dependent dispatches y = c x of four elements each, replayed and by hand, in turns. */
export async function replayOverhead(device: Device, runs = 15): Promise<ReplayOverhead> {
  const x = device.tensor([1, 2, 3, 4], [4]);
  const { graph, result } = device.capture(() => {
    let y: Tensor = x;
    for (let i = 0; i < LAUNCHES; i++) {
      const next = scope(() => scale(y, 1.0001));
      if (y !== x) y.dispose();
      y = next;
    }
    return y;
  });
  const byHand = await handWritten(device);
  const ways = { replay: () => device.replay(graph), hand: byHand.submit };
  const totals: Record<keyof typeof ways, number[]> = { replay: [], hand: [] };
  const hosts: Record<keyof typeof ways, number[]> = { replay: [], hand: [] };
  for (let run = -WARMUP; run < runs; run++) {
    for (const way of ["replay", "hand"] as const) {
      await device.finish();
      const start = performance.now();
      ways[way]();
      const host = performance.now() - start;
      await device.finish();
      if (run < 0) continue;
      totals[way].push(performance.now() - start);
      hosts[way].push(host);
    }
  }
  const ratios = totals.replay.map((ms, i) => ms / totals.hand[i]!);
  device.stream.disposeGraph(graph);
  result.dispose();
  x.dispose();
  byHand.destroy();
  return {
    times: totals.replay.toSorted((a, b) => a - b), replay_ms: median(totals.replay), hand_ms: median(
      totals.hand), ratio: median(ratios),
    replay_host_ms: median(hosts.replay), hand_host_ms: median(hosts.hand),
  };
}

/** The same work as somebody would write it who knows WebGPU and nothing else: one pass, one submission. */
async function handWritten(device: Device): Promise<{ submit: () => void; destroy: () => void }> {
  const { gpuDevice } = device;
  const code = `
    @group(0) @binding(0) var<storage, read> x: array<vec4f>;
    @group(0) @binding(1) var<storage, read_write> y: array<vec4f>;
    @group(0) @binding(2) var<uniform> s: f32;
    @compute @workgroup_size(64) fn main(
      @builtin(workgroup_id) wid: vec3u, @builtin(local_invocation_index) lane: u32,
    ) {
      for (var n = 0u; n < ${device.info.isSoftware ? 16 : 2}; n++) { // as the engine shares out the same op
        let i = (wid.x * ${device.info.isSoftware ? 16 : 2} + n) * 64 + lane;
        if (i < arrayLength(&y)) { y[i] = x[i] * s; }
      }
    }`;
  const pipeline = await gpuDevice.createComputePipelineAsync({
    layout: "auto", compute: { module: gpuDevice.createShaderModule({ code }), entryPoint: "main" },
  });
  const usage = 0x80 | 0x40 | 0x08; // STORAGE | UNIFORM | COPY_DST
  const [a, b, s] = [16, 16, 16].map((size) => gpuDevice.createBuffer({ size, usage })) as
    [GPUBuffer, GPUBuffer, GPUBuffer];
  gpuDevice.queue.writeBuffer(s, 0, new Float32Array([1.0001]));
  const [forth, back] = [[a, b], [b, a]].map(([from, to]) => gpuDevice.createBindGroup({
    layout: pipeline.getBindGroupLayout(0),
    entries: [from!, to!, s].map((buffer, binding) => ({ binding, resource: { buffer } })),
  })) as [GPUBindGroup, GPUBindGroup];
  return {
    submit() {
      const encoder = gpuDevice.createCommandEncoder();
      const pass = encoder.beginComputePass();
      pass.setPipeline(pipeline);
      for (let i = 0; i < LAUNCHES; i++) {
        pass.setBindGroup(0, i % 2 === 0 ? forth : back);
        pass.dispatchWorkgroups(1);
      }
      pass.end();
      gpuDevice.queue.submit([encoder.finish()]);
    },
    destroy: () => [a, b, s].forEach((buffer) => buffer.destroy()),
  };
}

export interface DecodeOverhead {
  /** Median milliseconds per token. */
  readonly token_ms: number;
  /** Of these, spent in JavaScript and in calls of WebGPU rather than in waiting for the result. */
  readonly host_ms: number;
  readonly share: number;
}

/** The host's share of the time per decoded token, after a short prompt. */
export async function decodeOverhead(model: NemotronH, tokens = 48, draft = 0): Promise<DecodeOverhead> {
  const prompt = Array.from({ length: 16 }, (_, i) => (7 * i) % Math.min(256, model.config.vocab_size));
  const generator = new Generator(model, prompt.length + tokens + draft);
  const shares: DecodeOverhead[] = [];
  for (let run = -1; run < 5; run++) {
    for await (const _ of generator.generate(prompt, { maxTokens: tokens, draft })) {
      // tokens are only timed
    }
    const { decodeMs, hostMs } = generator.stats;
    const [token_ms, host_ms] = [decodeMs / (tokens - 1), hostMs / (tokens - 1)];
    if (run >= 0) shares.push({ token_ms, host_ms, share: host_ms / token_ms });
  }
  generator.dispose();
  const by = (key: keyof DecodeOverhead) => median(shares.map((each) => each[key]));
  return { token_ms: by("token_ms"), host_ms: by("host_ms"), share: by("share") };
}

function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
}
