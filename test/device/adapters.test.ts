import { spawnSync } from "node:child_process";
import { expect, test } from "vitest";
import { provider } from "#gpu";
import { ROOT } from "../support/imports.ts";

const onLinux = process.platform === "linux" && process.arch === "x64";

/** Runs a script of test/support in a process of its own, with the environment changed. */
function runWith(change: Record<string, string>, name: string): { lines: string[]; stderr: string } {
  const env = { ...process.env, ...change };
  const script = ["src/cli/source.mjs", `test/support/${name}.ts`];
  const { stdout, stderr } = spawnSync(process.execPath, script, { cwd: ROOT, env, encoding: "utf8" });
  return { lines: stdout.trim().split("\n"), stderr };
}

function listWith(change: Record<string, string>): { ids: string[]; stderr: string } {
  const { lines: ids, stderr } = runWith(change, "list_adapters");
  return { ids, stderr };
}

test.runIf(onLinux)("a machine without a driver has SwiftShader, and no driver warns on stderr", () => {
  const { ids, stderr } = listWith({ VK_DRIVER_FILES: "/nonexistent" });
  expect(ids).toEqual(["swiftshader"]);
  expect(stderr).not.toMatch(/vulkan|vk|dawn|adapter/i);
});

test.runIf(onLinux)("SwiftShader is there beside this machine's drivers", () => {
  expect(listWith({}).ids).toContain("swiftshader");
});

test("every adapter opens devices beside the others and gives them its own name", async () => {
  const handles = await provider.listAdapters();
  expect(new Set(handles.map(({ info }) => info.id)).size).toBe(handles.length);
  const before = { files: process.env["VK_DRIVER_FILES"], icd: process.env["VK_ICD_FILENAMES"] };
  const twice = [...handles, ...handles];
  const devices = await Promise.all(twice.map(async (each) => (await each.request()).requestDevice()));
  for (const [i, device] of devices.entries()) {
    expect(device.adapterInfo.description).toBe(twice[i]?.info.description);
    device.destroy();
  }
  expect({ files: process.env["VK_DRIVER_FILES"], icd: process.env["VK_ICD_FILENAMES"] }).toEqual(before);
});

test("indices go unchecked on SwiftShader alone, and nowhere with KRAIT_ROBUSTNESS=on", () => {
  const unchecked = (setting: string) => {
    const { lines } = runWith({ KRAIT_ROBUSTNESS: setting }, "read_past");
    expect(lines.every((line) => /^\S+ (0|10[0-4])$/.test(line))).toBe(true);
    return lines.filter((line) => line.endsWith(" 104"));
  };
  const ids = (process.env["KRAIT_ADAPTER"] ?? "swiftshader") === "swiftshader" ? ["swiftshader"] : [];
  expect(unchecked("")).toEqual(ids.map((id) => `${id} 104`));
  expect(unchecked("on")).toEqual([]);
});
