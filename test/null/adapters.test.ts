import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, describe, expect, test, vi } from "vitest";
import { adapterFamily, chooseAdapter, describeAdapter } from "../../src/gpu/adapters.ts";
import { AdapterError } from "../../src/gpu/errors.ts";
import { untar } from "../../src/gpu/fallback.node.ts";
import type { AdapterHandle } from "../../src/gpu/adapters.ts";

function fakeAdapter(info: Partial<GPUAdapterInfo>): GPUAdapter {
  return {
    info: { vendor: "", architecture: "", device: "", description: "", isFallbackAdapter: false, ...info },
    features: new Set(["subgroups", "shader-f16"]),
    limits: { maxBufferSize: 1024 },
  } as unknown as GPUAdapter;
}

function handle(name: string, info: Partial<GPUAdapterInfo> = {}): AdapterHandle {
  const adapter = fakeAdapter(info);
  return { info: describeAdapter(adapter, name), request: () => Promise.resolve(adapter) };
}

const swiftshader = handle("SwiftShader Device (Subzero)", { vendor: "google", isFallbackAdapter: true });
const lavapipe = handle("llvmpipe (LLVM 15.0.6, 256 bits)", { vendor: "mesa", isFallbackAdapter: true });
const integrated = handle("Intel(R) UHD Graphics 770", { vendor: "intel", architecture: "gen-12lp" });
const discrete = handle("NVIDIA GeForce RTX 4090", { vendor: "nvidia", architecture: "lovelace" });

afterEach(() => vi.unstubAllEnvs());

describe("describeAdapter", () => {
  test.each([
    ["NVIDIA H100 80GB HBM3", "nvidia", "discrete", "nvidia-h100-80gb-hbm3"],
    ["NVIDIA Tegra Orin (nvgpu)", "nvidia", "integrated", "nvidia-tegra-orin"],
    ["AMD Radeon RX 7900 XTX (RADV NAVI31)", "amd", "discrete", "amd-radeon-rx-7900-xtx"],
    ["AMD Radeon Graphics (RADV RENOIR)", "amd", "integrated", "amd-radeon-graphics"],
    ["AMD Radeon 780M", "amd", "integrated", "amd-radeon-780m"],
    ["Intel(R) Arc(tm) A770 Graphics (DG2)", "intel", "discrete", "intel-arc-a770-graphics"],
    ["Intel(R) Iris(R) Xe Graphics", "intel", "integrated", "intel-iris-xe-graphics"],
    ["Apple M3 Max", "apple", "integrated", "apple-m3-max"],
    ["Mali-G715", "arm", "integrated", "arm-mali-g715"],
    ["Something New", "", "unknown", "something-new"],
  ])("%s", (name, vendor, kind, id) => {
    const info = describeAdapter(fakeAdapter({ vendor }), name);
    expect(info).toMatchObject({ kind, id, name, isSoftware: false, subgroupMinSize: 0, subgroupMaxSize: 0 });
    expect(info.features).toEqual(["shader-f16", "subgroups"]);
    expect(info.limits).toEqual({ maxBufferSize: 1024 });
  });

  test("subgroup matrices are listed where the adapter has them", () => {
    expect(describeAdapter(fakeAdapter({})).subgroupMatrices).toEqual([]);
    const config = { componentType: "f16", resultComponentType: "f32", M: 16, N: 8, K: 16 };
    const info = { subgroupMatrixConfigs: [Object.create(config) as typeof config] };
    expect(describeAdapter(fakeAdapter(info as Partial<GPUAdapterInfo>)).subgroupMatrices).toEqual([config]);
  });

  test("a page's adapter has no name but still an id", () => {
    const info = describeAdapter(fakeAdapter({ vendor: "google", architecture: "swiftshader" }));
    expect(info).toMatchObject({ name: "google swiftshader", id: "swiftshader", isSoftware: true });
    expect(describeAdapter(fakeAdapter({})).id).toBe("gpu");
  });
});

describe("chooseAdapter", () => {
  test("prefers discrete, then integrated, then lavapipe, then SwiftShader", () => {
    vi.stubEnv("KRAIT_ADAPTER", "");
    const found = [swiftshader, lavapipe, integrated, discrete];
    for (const best of [discrete, integrated, lavapipe, swiftshader]) {
      const choice = chooseAdapter(found);
      expect(choice.handle).toBe(best);
      expect(choice.reason).not.toBe("");
      found.splice(found.indexOf(best), 1);
    }
  });

  test("takes a part of a name, before the environment and before the order", () => {
    vi.stubEnv("KRAIT_ADAPTER", "lavapipe");
    const found = [swiftshader, lavapipe, discrete];
    expect(chooseAdapter(found, "sWiFt").handle).toBe(swiftshader);
    const choice = chooseAdapter(found);
    expect(choice.handle).toBe(lavapipe);
    expect(choice.reason).toContain("KRAIT_ADAPTER");
  });

  test("names what was found when nothing matches", () => {
    expect(() => chooseAdapter([swiftshader, lavapipe], "nvidia")).toThrow(AdapterError);
    expect(() => chooseAdapter([swiftshader, lavapipe], "nvidia"))
      .toThrow(/"nvidia".*lavapipe \(llvmpipe.*swiftshader \(SwiftShader/);
    expect(() => chooseAdapter([])).toThrow(AdapterError);
  });
});

describe("untar", () => {
  const folder = mkdtempSync(join(tmpdir(), "krait-untar-"));
  afterEach(() => rmSync(folder, { recursive: true, force: true }));

  function entry(name: string, type: string, content = ""): Buffer {
    const block = Buffer.alloc(512 + Math.ceil(content.length / 512) * 512);
    block.write(name, 0);
    block.write("0000644\0", 100);
    block.write(content.length.toString(8).padStart(11, "0"), 124);
    block.write(type, 156);
    block.write(content, 512);
    return block;
  }

  test("writes files and folders", () => {
    const long = "x".repeat(700);
    const entries = [entry("lib/", "5"), entry("lib/a", "0", long), entry("b", "0"), Buffer.alloc(1024)];
    expect(untar(Buffer.concat(entries), folder)).toEqual(["lib/a", "b"]);
    expect(readFileSync(join(folder, "lib/a"), "utf8")).toBe(long);
    expect(readFileSync(join(folder, "b"), "utf8")).toBe("");
  });

  test.each([
    ["../outside", "0", "leaves its folder"],
    ["lib/../../outside", "0", "leaves its folder"],
    ["link", "2", "\"link\" has type \"2\""],
  ])("refuses %s of type %s", (name, type, message) => {
    expect(() => untar(entry(name, type), folder)).toThrow(message);
  });
});

test.each([
  [swiftshader, "software"], [lavapipe, "software"], [integrated, "intel"],
  [handle("NVIDIA H200", { vendor: "nvidia" }), "nvidia"],
  [handle("", { vendor: "apple", architecture: "metal-3" }), "apple"],
  [handle("AMD Radeon Graphics (RADV PHOENIX)", { vendor: "amd", architecture: "rdna-3" }), "amd"],
  [handle("Adreno 740", { vendor: "qualcomm" }), "qualcomm"], [handle("Mali-G78", { vendor: "arm" }), "arm"],
  [handle("Tegra Orin (nvgpu)"), "nvidia"], [handle("Some GPU"), "other"],
] as const)("the family of %s", ({ info }, family) => {
  expect(adapterFamily(info)).toBe(family);
  if (info.isSoftware) expect(adapterFamily({ ...info, isSoftware: false })).toBe("other");
});
