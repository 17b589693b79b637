import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, expect, test, vi } from "vitest";
import type { Gpu } from "../../src/gpu/gpu.ts";
import { codeHash } from "../../src/kernel/sources.node.ts";

/** Texts to see instead of the files: of a shader by its name, and the hash of the ops. */
const changed = vi.hoisted(() => new Map<string, string>());

vi.mock(import("../../src/kernel/sources.node.ts"), async (original) => {
  const real = await original();
  return {
    ...real,
    shaderSource: (name: string) => changed.get(name) ?? real.shaderSource(name),
    codeHash: (folder?: string) => changed.get("code") ?? real.codeHash(folder),
  };
});

const device = {
  info: { id: "any", vendor: "v", architecture: "a", name: "n", description: "driver 1" },
  gpuDevice: { features: new Set(["subgroups"]), limits: {} },
} as unknown as Gpu;

/** The build as a fresh process sees it. */
async function buildNow(): Promise<string> {
  vi.resetModules();
  const { TunerCache } = await import("../../src/kernel/tuner_cache.ts");
  return new TunerCache(device).identity.build;
}

const folder = mkdtempSync(join(tmpdir(), "krait-code-"));
afterAll(() => rmSync(folder, { recursive: true }));

test("measurements are of one build: any shader and the code of the ops make another", async () => {
  const build = await buildNow();
  expect(build).toMatch(/^[0-9a-f]{16}$/);
  expect(await buildNow()).toBe(build);
  changed.set("norm/softmax", "// another kernel");
  const otherShader = await buildNow();
  changed.clear();
  changed.set("code", "another code");
  const otherCode = await buildNow();
  changed.clear();
  expect(new Set([build, otherShader, otherCode]).size).toBe(3);
});

test("the code's hash follows every file of the folder, and the real one holds the ops", () => {
  const write = (name: string, text: string) => writeFileSync(join(folder, name), text);
  write("a.ts", "const WG = 64;");
  write("b.js", "1");
  const hashes = [codeHash(folder)];
  write("a.ts", "const WG = 32;");
  hashes.push(codeHash(folder));
  write("c.ts", "");
  hashes.push(codeHash(folder));
  write("notes.txt", "no code");
  expect(codeHash(folder)).toBe(hashes[2]);
  expect(new Set(hashes).size).toBe(3);
  expect(codeHash()).toBe(codeHash(new URL("../../src/ops/", import.meta.url).pathname));
  expect(codeHash()).not.toBe(codeHash(folder));
});
