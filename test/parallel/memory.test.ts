import { afterAll, describe, expect, test } from "vitest";
import { MEMORY_RECOMPUTES, measureMemory } from "../../src/cli/bench/memory.ts";
import { countParameters } from "../../src/models/accounting.ts";
import { preset, presetNames } from "../../src/models/presets.ts";
import { holdingsOf } from "../../src/parallel/holdings.ts";
import { parseLayout } from "../../src/parallel/layout.ts";
import type { Layout, StepSizes } from "../../src/parallel/layout.ts";
import {
  BF16_TRAINING, evenChunks, F32_TRAINING, layerActivations, liveMicroBatches, predictMemory, rankMemory,
} from "../../src/parallel/memory.ts";
import type { ActivationParts, MemoryOptions, Pipeline } from "../../src/parallel/memory.ts";
import { shapeOf, shapeParameters } from "../../src/parallel/model_shape.ts";
import type { ModelShape, ShapeLayer } from "../../src/parallel/model_shape.ts";
import { namedShape } from "../../src/parallel/published.ts";
import { stagesOf } from "../../src/parallel/stages.ts";
import { openDevice } from "../../src/tensor/device.ts";
import { testAdapters } from "../support/adapters.ts";
import { checkPredicted } from "../support/layouts.ts";

const nano = shapeOf(preset("nemotron-3-nano-30b-a3b"), "nano");
const bf16: MemoryOptions = { widths: BF16_TRAINING, recompute: "none", sharding: "optimizer" };
const sizes: StepSizes = { batch: 1, seqlen: 4096, micro_batches: 16 };
const kept = (parts: Partial<ActivationParts>) =>
  Object.values(parts).reduce((sum, bytes) => sum + bytes, 0);

/** The pipeline of a layout as stages.ts cuts it. */
function pipelineOf(layout: Layout, name: string): Pipeline {
  const shape = shapeOf(preset(name), name);
  const stages = stagesOf(layout, preset(name));
  return Array.from({ length: layout.pp }, (_, p) => stages.filter((_stage, i) => i % layout.pp === p).map(
    ({ from, to, embedding, head }) => ({ layers: shape.layers.slice(from, to), embedding, head })));
}

describe("parameters", () => {
  test.each(presetNames())("%s: the shape has all parameters of the configuration", (name) => {
    const config = preset(name);
    // Attention and MLP biases are not part of a shape; no preset has them.
    expect(shapeParameters(shapeOf(config, name))).toBe(countParameters(config).total);
  });

  test.each(["tp=2,pp=2,dp=4,ep=4", "tp=2,cp=2,dp=2,ep=8", "pp=4,vpp=2,dp=2,ep=2", "tp=2,etp=2,dp=4,ep=2"])(
    "of a rank under %s are those that its stages hold", (text) => {
      const name = "nemotron-3-nano-30b-a3b";
      const layout = parseLayout(text);
      const holdings = holdingsOf(layout, preset(name));
      const pipeline = pipelineOf(layout, name);
      holdings.forEach(({ dense, experts, untrained, shared }, rank) => {
        const { parameters, gradients, optimizer } = rankMemory(
          nano, layout, sizes, { ...bf16, stages: pipeline }, rank);
        // The formula divides keys and values by tp even where ranks share them, and counts routers' biases.
        const count = dense + experts + untrained;
        expect(Math.abs(parameters / 2 - count)).toBeLessThanOrEqual(shared + 1);
        expect(gradients).toBe(2 * parameters);
        const owned = (dense + untrained) / (layout.dp * layout.cp) + experts / layout.edp;
        expect(Math.abs(optimizer / 12 - owned)).toBeLessThanOrEqual(shared + 1);
      });
    });

  test.each<[MemoryOptions["sharding"], Partial<typeof BF16_TRAINING>, number]>([
    ["none", {}, 18], ["optimizer", {}, 6 + 12 / 8], ["all", {}, 18 / 8],
    ["none", F32_TRAINING, 16], ["optimizer", F32_TRAINING, 8 + 8 / 8],
    ["optimizer", { moments: 4 }, 6 + 8 / 8], ["none", { quantised: 2 }, 20],
  ])("bytes of each, sharding %s, widths %o: %f", (sharding, widths, expected) => {
    const dense = shapeOf(preset("nemotron-h-8b"), "8b");
    const { parameters, gradients, optimizer } = predictMemory(
      dense, parseLayout("dp=8"), sizes, { ...bf16, sharding, widths: { ...BF16_TRAINING, ...widths } });
    const each = (parameters + gradients + optimizer) / shapeParameters(dense);
    expect(each).toBeCloseTo(expected, 9);
  });
});

describe("activations", () => {
  const classic: ModelShape = {
    name: "classic", hidden: 1024, vocab: 1000, unit: 2, mtp: [], mtpDepths: 0,
    layers: Array.from({ length: 8 }, (_, i): ShapeLayer => i % 2 === 0
      ? { kind: "attention", heads: 16, kvHeads: 16, headDim: 64 }
      : { kind: "mlp", width: 4096, gated: false }),
  };

  test("of a classic transformer block are the published 34 bytes less dropout masks", () => {
    const solo = parseLayout("");
    const bytes = classic.layers.slice(0, 2).reduce((sum, layer) =>
      sum + kept(layerActivations(1024, layer, solo, sizes, bf16)), 0);
    // 34 S B H with two dropout masks of one byte, which this block lacks. Log-sums of attention: 4 bytes a
    // head, in place of softmax's output.
    expect(bytes / (4096 * 1024)).toBeCloseTo(34 - 2 + 4 * 16 / 1024, 9);
  });

  test("are divided by tp with sequence parallelism, and by cp", () => {
    const of = (text: string) => classic.layers.slice(0, 2).reduce((sum, layer) =>
      sum + kept(layerActivations(1024, layer, parseLayout(text), sizes, bf16)), 0);
    expect(of("tp=4")).toBe(of("") / 4);
    expect(of("cp=4")).toBe(of("") / 4);
    const norms = 4 * 2 * 4096 * 1024;
    expect(of("tp=4,sp=off")).toBe((of("") - norms) / 4 + norms);
  });

  test("of experts follow the rows they receive", () => {
    const layer: ShapeLayer = {
      kind: "moe", experts: 8, topk: 2, width: 512, gated: true, latent: null, shared: 0,
    };
    const { experts } = layerActivations(1024, layer, parseLayout("dp=4,ep=4"), sizes, bf16);
    const rows = 2 * 4096;
    expect(experts).toBe(rows * (2 * 1024 + 2 * 2 * 512 + 2 * 512 + 8));
    // Under etp a rank sees the rows of all its etp peers, at a part of the width.
    const split = layerActivations(1024, layer, parseLayout("dp=4,ep=2,etp=2"), sizes, bf16).experts;
    expect(split).toBe(2 * rows * (2 * 1024 + 2 * 2 * 256 + 2 * 256 + 8));
  });

  test("fall with each step of recomputation, for every model", () => {
    for (const name of ["nemotron-3-super", "deepseek-v3", "mixtral-8x22b"]) {
      const shape = namedShape(name)!;
      const of = (recompute: MemoryOptions["recompute"]) => kept(predictMemory(
        shape, parseLayout("pp=4,dp=64,ep=8"), sizes, { ...bf16, recompute }).activations);
      expect(of("selective")).toBeLessThan(of("none"));
      expect(of("moe")).toBeLessThan(of("selective"));
      expect(of("full")).toBeLessThan(of("moe"));
    }
  });

  test("live as long as the schedules say", () => {
    const live = (text: string, micros: number) => {
      const layout = parseLayout(text);
      return Array.from({ length: layout.pp }, (_, rank) => liveMicroBatches(layout, micros, rank));
    };
    expect(live("pp=4", 16)).toEqual([4, 3, 2, 1]);
    expect(live("pp=4", 2)).toEqual([2, 2, 2, 1]);
    // Interleaved, in chunks of half a rank's layers: warm-up 2 (P - p - 1) + P, and the one that runs.
    expect(live("pp=4,vpp=2", 16)).toEqual([11 / 2, 9 / 2, 7 / 2, 5 / 2]);
  });

  /** 256 GPUs, PP4 VPP4 EP64, as the Megatron Core paper lists it: a rank in the middle of the pipeline. */
  test("of DeepSeek-V3 come within a tenth of the published ones", () => {
    const shape = namedShape("deepseek-v3")!;
    const layout = parseLayout("pp=4,vpp=4,dp=64,ep=64");
    const stages = evenChunks(shape, 4, 4);
    const many = { ...sizes, micro_batches: 128 };
    const of = (recompute: MemoryOptions["recompute"]) =>
      rankMemory(shape, layout, many, { ...bf16, recompute, stages }, 2);
    // 131.0 GB, 26.3 of them outputs of experts' second products, which are not kept here; recomputation
    // of up-projections, activations and norms saves 42.4 GB.
    expect(kept(of("none").activations) / 1e9).toBeGreaterThan(0.9 * (131 - 26.3));
    expect(kept(of("none").activations) / 1e9).toBeLessThan(1.1 * (131 - 26.3));
    expect(kept(of("selective").activations) / 1e9).toBeGreaterThan(0.9 * (131 - 26.3 - 42.4));
    expect(kept(of("selective").activations) / 1e9).toBeLessThan(1.1 * (131 - 26.3 - 42.4));
    expect(of("none").optimizer / 1e9).toBeGreaterThan(0.9 * 32.1);
    expect(of("none").optimizer / 1e9).toBeLessThan(1.1 * 32.1);
  });
});

test("the most loaded rank is the one with the largest total", () => {
  const layout = parseLayout("tp=2,pp=4,dp=4,ep=8");
  const stages = evenChunks(nano, 4, 1);
  const totals = [0, 1, 2, 3].map((rank) => rankMemory(nano, layout, sizes, { ...bf16, stages }, rank).total);
  const most = predictMemory(nano, layout, sizes, bf16);
  expect(most.total).toBe(Math.max(...totals));
  const { rank, total, activations, ...parts } = most;
  expect(totals[rank]).toBe(total);
  const state = Object.values(parts).reduce((sum, bytes) => sum + bytes, 0);
  expect(state + kept(activations)).toBeCloseTo(total, 0);
});

describe("what ranks of other models hold is predicted", async () => {
  const device = await openDevice({ adapter: (await testAdapters())[0]! });
  afterAll(() => device.destroy());
  device.stream.muted = true; // a step is recorded, and nothing of it is compiled or run

  for (const name of ["wide", "deep"]) {
    for (const layout of ["tp=1", "tp=2", "cp=2,cp_kind=alltoall", "pp=2,vpp=2", "tp=2,cp=2,dp=2,ep=4"]) {
      test.each(Object.values(MEMORY_RECOMPUTES))(`${name} ${layout}, recomputing %s`, async (recompute) => {
        checkPredicted(await measureMemory(device, name, layout, recompute));
      });
    }
  }
});
