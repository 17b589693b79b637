import { expect, test } from "vitest";
import {
  f16ToF32, f32ToF16, fromBlocks, ggufBlocks, packedInOrder, roundedToF16, toBlocks,
} from "../../bench/peers/blocks.ts";
import { CASES } from "../../bench/peers/cases.ts";
import { encodeGguf } from "../../bench/peers/gguf.ts";
import { DENSE, MOE, expectedLogits, hybridGguf, parameterShapes, prompt,
  textOf } from "../../bench/peers/hybrid.ts";
import { encodeModel } from "../../bench/peers/onnx.ts";
import { PEERS } from "../../bench/peers/peers.ts";
import {
  comparison, formatRequest, lineSplitter, parseReply, parseRequest, relativeError, repetitions, slope,
  spread, summarise,
} from "../../bench/peers/protocol.ts";
import { random } from "../../bench/peers/random.ts";
import { listParameters } from "../../src/models/checkpoint_names.ts";
import type { NemotronHConfig } from "../../src/models/config.ts";
import * as dtype from "../../src/tensor/dtype.ts";

test("every request is read back as it was written", () => {
  for (const request of [
    { verb: "prepare", name: "ssd_512" }, { verb: "run", n: 12 }, { verb: "sample", indices: [0, 7, 9] },
    { verb: "quit" },
  ] as const) {
    expect(parseRequest(formatRequest(request))).toEqual(request);
  }
});

test.each(["", "run", "run 0", "run 1.5", "run 3 4", "sample 1,", "quit now", "prepare", "stop"])(
  "the request %j is refused", (line) => {
    expect(() => parseRequest(line)).toThrow(`found "${line}"`);
  });

test("replies: numbers, errors, and NaN that JSON cannot say", () => {
  expect(parseReply('{"ok":true,"numbers":[1.5,2],"note":"n"}'))
    .toEqual({ ok: true, numbers: [1.5, 2], note: "n" });
  expect(parseReply('{"ok":false,"error":"no device"}')).toEqual({ ok: false, error: "no device" });
  const line = JSON.stringify({ ok: true, numbers: [NaN, 1], note: "" });
  expect(parseReply(line)).toEqual({ ok: true, numbers: [NaN, 1], note: "" });
  for (const bad of ["", "null", "ok", '{"ok":true}', '{"ok":false}', '{"ok":1,"numbers":[],"note":""}']) {
    expect(() => parseReply(bad)).toThrow("a JSON object with \"ok\"");
  }
});

test("lines that arrive in pieces are put together", () => {
  const lines: string[] = [];
  const split = lineSplitter((line) => lines.push(line));
  for (const piece of ["ab", "c\nd\n\ne", "f", "\ng"]) split(piece);
  expect(lines).toEqual(["abc", "d", "ef"]);
});

test("median, spread and ratio", () => {
  expect(spread([3, 1, 2])).toEqual({ median: 2, min: 1, max: 3 });
  expect(spread([4, 1, 3, 2])).toEqual({ median: 2.5, min: 1, max: 4 });
  expect(comparison([2, 1, 3], [9, 5, 8])).toEqual({
    ms: 2, min_ms: 1, max_ms: 3, peer_ms: 8, peer_min_ms: 5, peer_max_ms: 9, ratio: 4, runs: 3,
  });
});

test("relative errors are of the largest expected element, or of the largest change", () => {
  expect(relativeError([1, 2.5, -4], [1, 2, -4])).toBe(0.125);
  expect(relativeError([10.5, 11], [10, 11], [9, 9])).toBe(0.25);
  expect(relativeError([1, NaN, 2], [1, 1, 2])).toBeNaN();
  expect(relativeError([1], [1, 2])).toBeNaN();
});

test("repetitions fill a round and stay in their limits", () => {
  expect(repetitions(10, 100, 24)).toBe(10);
  expect(repetitions(1000, 100, 24)).toBe(1);
  expect(repetitions(0, 100, 24)).toBe(24);
  expect(repetitions(20, 100, 128, 32)).toBe(32);
});

test("the slope leaves out what every run costs, and refuses a chain that costs nothing", async () => {
  expect(await slope(5, async (links) => 40 + 3 * links)).toBe(3);
  expect(await slope(1, async (links) => 40 + 3 * links)).toBe(3);
  const chains: number[] = [];
  await slope(1, async (links) => {
    chains.push(links);
    return 2000 * links;
  });
  expect(chains).toEqual([1, 2]); // long links need no long chain
  await expect(slope(5, async () => 40)).rejects.toThrow("never took longer");
});

test("a model's bytes", () => {
  const model = encodeModel({
    nodes: [{ op: "A", inputs: ["x"], outputs: ["y"], attributes: { n: -1, f: { float: 1 } } }],
    inputs: { x: [300] }, outputs: ["y"], constants: {},
  });
  const text = Buffer.from(model).toString("hex");
  expect(text.startsWith("08083a")).toBe(true); // ir_version 8, then the graph
  expect(text).toContain("0a016e18ffffffffffffffffff01a00102"); // "n": an int of 64 bits
  expect(text).toContain("0a0166150000803fa00101"); // "f": a float
  expect(text).toContain("5a100a0178120b0a09080112050a0308ac02"); // the graph's input x, f32 [300]
});

test("a case's inputs are the same each time, centred, and scaled as asked", () => {
  const wanted = CASES.find(({ name }) => name === "matmul_f32_512")!;
  const [a, b] = [wanted.inputs(), wanted.inputs()];
  expect(a).toEqual(b);
  const { data } = a["w"]!;
  const mean = data.reduce((sum, x) => sum + x, 0) / data.length;
  const variance = data.reduce((sum, x) => sum + x * x, 0) / data.length;
  expect(Math.abs(mean)).toBeLessThan(3e-4);
  expect(variance * 512).toBeCloseTo(1, 1);
});

test("the expected elements are a product's", () => {
  const wanted = CASES.find(({ name }) => name === "matmul_f32_512")!;
  const data = Float32Array.from({ length: 512 ** 2 }, (_, i) => +(i % 513 === 0));
  const eye = { shape: [512, 512], data };
  const { w } = wanted.inputs();
  const { indices, values } = wanted.expected({ x: eye, w: w! });
  expect(new Set(indices).size).toBe(indices.length);
  expect(values).toEqual(indices.map((i) => w!.data[i]));
});

test("the cases that reports count on, and every peer has cases", () => {
  expect(CASES.map(({ name }) => name)).toEqual([
    "matmul_f32_512", "matmul_f32_1024", "matmul_f16_512", "matmul_f16_1024", "matvec_f32_4096",
    "matvec_q4_4096", "matvec_q8_4096", "softmax_1024x4096", "layernorm_1024x4096", "attention_512x8x64",
    "ssd_512", "ssd_step", "conv_silu_512", "mlp_train", "llm_prefill", "llm_decode", "copy_16m",
    "llm_moe_prefill", "llm_moe_decode",
  ]);
  expect(new Set(PEERS.map(({ name }) => name)).size).toBe(PEERS.length);
});

test("the summary leaves out wrong answers and other processors", () => {
  const line = (name: string, peer: string, ratio: number, peer_ok = true, peer_kind: "gpu" | "cpu" =
    "gpu") =>
    ({ case: name, peer, ratio, peer_ok, peer_kind });
  expect(summarise([
    line("a", "slow", 5), line("a", "wrong", 0.5, false), line("a", "fast", 2), line("b", "wrong", 3, false),
    line("a", "native", 0.1, true, "cpu"), line("c", "one", 1),
  ])).toEqual([{ case: "a", peer: "fast", ratio: 2 }, { case: "c", peer: "one", ratio: 1 }]);
});

test("blocks of 32 keep multiples of their scale, and round others to the nearest", () => {
  const values = random(1, [320], 1).data;
  for (const bits of [4, 8] as const) {
    const once = fromBlocks(toBlocks(values, bits));
    expect(fromBlocks(toBlocks(once, bits))).toEqual(once);
    for (let b = 0; b < 10; b++) {
      const part = [...values.subarray(32 * b, 32 * b + 32)];
      const step = Math.max(...part.map(Math.abs)) / (bits === 4 ? 8 : 127);
      // 7 is the last code upwards where the largest value is negative, so the far end is cut by a whole
      // step.
      const most = bits === 4 ? 1.001 * step : 0.51 * step;
      part.forEach((x, i) => expect(Math.abs(once[32 * b + i]! - x)).toBeLessThan(most));
    }
  }
  expect(fromBlocks(toBlocks(new Float32Array(32), 4)).every((x) => x === 0)).toBe(true);
  expect(() => toBlocks(new Float32Array(33), 4)).toThrow("found 33");
});

test("the bytes of blocks", () => {
  const values = Float32Array.from({ length: 32 }, (_, i) => (i % 16) - 8); // the scale is 1
  const blocks = toBlocks(values, 4);
  expect([...blocks.codes]).toEqual([...values]);
  const ramp = Array.from({ length: 16 }, (_, i) => i);
  expect([...ggufBlocks(blocks)]).toEqual([0x00, 0x3c, ...ramp.map((i) => i | (i << 4))]);
  expect([...packedInOrder(blocks)]).toEqual(
    Array.from({ length: 16 }, (_, i) => ((2 * i) % 16) | (((2 * i + 1) % 16) << 4)));
  const wide = toBlocks(Float32Array.from({ length: 32 }, (_, i) => (i === 0 ? 127 : -i)), 8);
  expect([...ggufBlocks(wide)].slice(0, 5)).toEqual([0x00, 0x3c, 127, 255, 254]);
});

test("f16 rounding: ties to even, and no value moves twice", () => {
  const rounded = roundedToF16(Float32Array.of(1, 1 + 2 ** -11, 1 + 3 * 2 ** -11, 0.1));
  expect([...rounded]).toEqual([1, 1, 1 + 2 ** -9, 0.0999755859375]);
  expect(roundedToF16(rounded)).toEqual(rounded);
});

test("f16 bits are those of the engine's own conversion", () => {
  for (let bits = 0; bits < 0x10000; bits++) {
    const value = dtype.f16ToF32(bits);
    if (!Number.isFinite(value)) continue;
    expect(f16ToF32(bits)).toBe(value);
    expect(f32ToF16(value)).toBe(bits);
  }
  for (const scale of [1e-9, 1e-7, 1e-5, 1, 300, 4e4]) {
    for (const x of random(3, [200], scale).data) expect(f32ToF16(x)).toBe(dtype.f32ToF16(x));
  }
  for (const x of [0, -0, Infinity, -Infinity, 65519, 65520, 2 ** -25, 2 ** -24, 3 * 2 ** -26, NaN]) {
    expect(f32ToF16(x)).toBe(dtype.f32ToF16(x));
  }
});

test("the small hybrid's parameters are those of the engine", () => {
  for (const config of [DENSE, MOE]) {
    const shapes = (list: readonly (readonly [string, readonly number[]])[]) =>
      Object.fromEntries(list);
    expect(shapes(parameterShapes(config)))
      .toEqual(shapes(listParameters(config).map(({ name, shape }) => [name, shape])));
  }
});

/** A reader of what the writer makes. */
function readGguf(file: Uint8Array) {
  const view = new DataView(file.buffer, file.byteOffset, file.byteLength);
  let at = 4;
  const u32 = () => view.getUint32((at += 4) - 4, true);
  const u64 = () => Number(view.getBigUint64((at += 8) - 8, true));
  const string = () => {
    const size = u64();
    at += size;
    return new TextDecoder().decode(file.subarray(at - size, at));
  };
  const value = (type: number): unknown => {
    switch (type) {
      case 4: return u32();
      case 5: return view.getInt32((at += 4) - 4, true);
      case 6: return view.getFloat32((at += 4) - 4, true);
      case 7: return file[at++] === 1;
      case 8: return string();
      case 9: {
        const of = u32();
        return Array.from({ length: u64() }, () => value(of));
      }
      default: throw new Error(`type ${type}`);
    }
  };
  const version = u32();
  const [tensorCount, settingCount] = [u64(), u64()];
  const settings = Object.fromEntries(Array.from({ length: settingCount }, () => [string(), value(u32())]));
  const tensors = Array.from({ length: tensorCount }, () => {
    const name = string();
    const shape = Array.from({ length: u32() }, u64);
    return { name, shape, type: u32(), offset: u64() };
  });
  return { magic: new TextDecoder().decode(file.subarray(0, 4)), version, settings, tensors, start: at };
}

test("a GGUF file: settings of every type, tensors at multiples of 32", () => {
  const file = encodeGguf(
    { a: 7, b: "two", c: true, d: { float: 0.5 }, e: [1, -2], f: ["x", "yz"], g: Float32Array.of(-1) },
    [
      { name: "first", shape: [2, 3], data: Float32Array.of(1, 2, 3, 4, 5, 6) },
      { name: "second", shape: [2, 32], data: toBlocks(new Float32Array(64).fill(8), 4) },
      { name: "third", shape: [1], data: Float32Array.of(9) },
    ]);
  const read = readGguf(file);
  expect(read.magic).toBe("GGUF");
  expect(read.version).toBe(3);
  expect(read.settings).toEqual({ a: 7, b: "two", c: true, d: 0.5, e: [1, -2], f: ["x", "yz"], g: [-1] });
  expect(read.tensors).toEqual([
    { name: "first", shape: [3, 2], type: 0, offset: 0 },
    { name: "second", shape: [32, 2], type: 2, offset: 32 },
    { name: "third", shape: [1], type: 0, offset: 96 },
  ]);
  const data = Math.ceil(read.start / 32) * 32;
  expect(file.length).toBe(data + 128);
  expect(new DataView(file.buffer).getFloat32(data + 20, true)).toBe(6);
  expect(new DataView(file.buffer).getFloat32(data + 96, true)).toBe(9);
});

/** All parameters of a model, each filled with one number. */
const filled = (config: NemotronHConfig) => Object.fromEntries(listParameters(config).map(
  ({ name, shape }) => [name, { shape, data: new Float32Array(shape.reduce((a, b) => a * b, 1)).fill(
    0.5) }]));

test("the small hybrid as a GGUF file holds every parameter once", () => {
  const small = (config: NemotronHConfig): NemotronHConfig => ({
    ...config, hidden_size: 64, vocab_size: 288, intermediate_size: 96, num_attention_heads: 2,
    num_key_value_heads: 1, head_dim: 32, mamba_num_heads: 2, mamba_head_dim: 32, ssm_state_size: 16,
    n_groups: 2, n_routed_experts: 4, num_experts_per_tok: 2, moe_intermediate_size: 32,
    moe_shared_expert_intermediate_size: 32,
  });
  for (const [config, arch] of [[small(DENSE), "nemotron_h"], [small(MOE), "nemotron_h_moe"]] as const) {
    const weights = filled(config);
    const { settings, tensors } = readGguf(hybridGguf(config, weights));
    expect(settings["general.architecture"]).toBe(arch);
    expect(settings[`${arch}.ssm.inner_size`]).toBe(64);
    expect((settings[`${arch}.attention.head_count_kv`] as number[]).map(Boolean))
      .toEqual([...config.hybrid_override_pattern].map((letter) => letter === "*"));
    const count = (shapes: readonly (readonly number[])[]) =>
      shapes.reduce((sum, shape) => sum + shape.reduce((a, b) => a * b, 1), 0);
    expect(count(tensors.map(({ shape }) => shape)))
      .toBe(count(Object.values(weights).map(({ shape }) => shape)));
    const pieces = settings["tokenizer.ggml.tokens"] as string[];
    expect(new Set(pieces).size).toBe(288);
    expect(textOf([260, 287])).toBe(pieces[260]! + pieces[287]!);
    const ids = [260, 270, 261];
    const logits = expectedLogits(config, weights, ids);
    expect(logits).toHaveLength(288);
    expect(Math.max(...logits.map(Math.abs))).toBeLessThan(1e-9); // equal rows of the head: equal logits
  }
});

test("prompts stay in the vocabulary and begin alike", () => {
  const ids = prompt(512);
  expect(ids.every((id) => id >= 259 && id < DENSE.vocab_size)).toBe(true);
  expect(prompt(12)).toEqual(ids.slice(0, 12));
  expect(new Set(ids).size).toBeGreaterThan(400);
});
