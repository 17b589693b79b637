import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, readFileSync, readdirSync, rmSync, truncateSync, writeFileSync } from "node:fs";
import { hostname, tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, describe, expect, test } from "vitest";
import { listCheckpoints, openCheckpoint, saveCheckpoint } from "../../src/io/checkpoint_files.ts";
import type { FileLayer } from "../../src/io/checkpoint_files.ts";
import { localFileLayer } from "../../src/io/files.node.ts";
import { FormatError, UsageError } from "../../src/tensor/errors.ts";
import { SimulatedDisk } from "../support/simulated_disk.ts";
import type { Fault, Survival } from "../support/simulated_disk.ts";

type Files = Record<string, Uint8Array | string | AsyncIterable<Uint8Array>>;

const OLD = { "state.json": '{"step":1}', "weights.bin": Uint8Array.of(1, 2, 3), "optim.bin": "old" };
const NEW = { "state.json": '{"step":2}', "weights.bin": Uint8Array.of(9, 8, 7, 6), "optim.bin": "new" };
const THIRD = { "state.json": '{"step":3}', "more.bin": new Uint8Array(0) };

/** The contents of the current checkpoint, as text by file name; null when there is none. */
async function contents(layer: FileLayer, root: string): Promise<Record<string, string> | null> {
  const saved = await openCheckpoint(layer, root);
  if (!saved) return null;
  const read: Record<string, string> = {};
  for (const { name } of saved.files) read[name] = Buffer.from(await saved.read(name)).toString("latin1");
  return read;
}

const asText = (files: Record<string, Uint8Array | string>) => Object.fromEntries(
  Object.entries(files).map(([name, content]) => [name, Buffer.from(content as string).toString("latin1")]));

/** A pseudo-random chooser, different for every seed. */
function chooser(seed: number): Survival {
  let state = seed;
  const next = () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 32;
  };
  next();
  return { keepsName: () => next() < 0.5, keepsBytes: (written) => Math.floor(next() * (written + 1)) };
}

const EVERYTHING: Survival = { keepsName: () => true, keepsBytes: (written) => written };
const NOTHING: Survival = { keepsName: () => false, keepsBytes: () => 0 };
const SURVIVALS: [string, Survival][] = [
  ["everything", EVERYTHING], ["nothing", NOTHING], ["names only", { ...EVERYTHING, keepsBytes: () => 0 }],
  ["bytes only", { ...NOTHING, keepsBytes: (written) => written }],
  ...Array.from({ length: 8 }, (_, seed): [string, Survival] => [`seed ${seed}`, chooser(seed)]),
];

async function operationsOfSave(before: boolean, keep: number): Promise<number> {
  const disk = new SimulatedDisk();
  const layer = disk.process("p1");
  if (before) await saveCheckpoint(layer, "run", 1, OLD, { keep });
  disk.count = 0;
  await saveCheckpoint(layer, "run", 2, NEW, { keep });
  return disk.count;
}

/** Saves OLD, then NEW with a fault, then restarts: there must be OLD or NEW, and saving must go on. */
async function interrupted(
  fault: Fault, keep: number, before: boolean, survival: Survival | null,
): Promise<string> {
  const disk = new SimulatedDisk();
  const layer = disk.process("p1");
  if (before) await saveCheckpoint(layer, "run", 1, OLD, { keep });
  disk.count = 0;
  disk.fault = fault;
  const saved = await saveCheckpoint(layer, "run", 2, NEW, { keep }).then(() => true, () => false);
  disk.fault = null;
  let after = layer;
  if (survival) {
    disk.crash(survival);
    after = disk.process("p2");
  }
  const found = await contents(after, "run");
  const old = before ? asText(OLD) : null;
  const isNew = JSON.stringify(found) === JSON.stringify(sorted(asText(NEW)));
  if (!isNew) expect(found).toEqual(old);
  if (saved) expect(isNew).toBe(true);

  await saveCheckpoint(after, "run", 3, THIRD, { keep });
  expect(await contents(after, "run")).toEqual(asText(THIRD));
  const names = await after.list("run");
  expect(names.filter((name) => name.includes("tmp") || name === "lock")).toEqual([]);
  expect((await listCheckpoints(after, "run")).length).toBeLessThanOrEqual(keep);
  return isNew ? "new" : "old";
}

function sorted(files: Record<string, string>): Record<string, string> {
  return Object.fromEntries(Object.entries(files).toSorted(([a], [b]) => (a < b ? -1 : 1)));
}

describe("stopped at every operation of a save", () => {
  for (const [before, keep] of [[true, 1], [true, 2], [false, 3]] as const) {
    const title = `${before ? "over an old one" : "the first one"}, keeping ${keep}`;
    test.each(SURVIVALS)(`${title}: power off, %s survives`, async (_, survival) => {
      const operations = await operationsOfSave(before, keep);
      expect(operations).toBeGreaterThan(25);
      const outcomes = new Set<string>();
      for (let at = 1; at <= operations; at++) {
        outcomes.add(await interrupted({ at, mode: "dead" }, keep, before, survival));
      }
      expect(outcomes).toEqual(new Set(["old", "new"]));
    });

    test(`${title}: the process stops, and the same process number comes back`, async () => {
      const operations = await operationsOfSave(before, keep);
      for (let at = 1; at <= operations; at++) await interrupted({ at, mode: "dead" }, keep, before, null);
    });

    test(`${title}: one operation fails, or the disk is full`, async () => {
      const operations = await operationsOfSave(before, keep);
      for (let at = 1; at <= operations; at++) {
        await interrupted({ at, mode: "once" }, keep, before, null);
        await interrupted({ at, mode: "full" }, keep, before, null);
        await interrupted({ at, mode: "full" }, keep, before, NOTHING);
      }
    });
  }

  test("a full disk leaves no half-written folder behind, and says so", async () => {
    const disk = new SimulatedDisk();
    const layer = disk.process("p1");
    await saveCheckpoint(layer, "run", 1, OLD);
    disk.fault = { at: disk.count + 10, mode: "full" };
    await expect(saveCheckpoint(layer, "run", 2, NEW)).rejects.toThrow(/^full at /);
    expect(await layer.list("run")).toEqual(["latest", "step-00000001"]);
  });
});

describe("keeping and finding", () => {
  const disk = () => new SimulatedDisk().process("p");

  test("the last k stay; a step saved twice has two folders and the second is current", async () => {
    const layer = disk();
    for (const step of [1, 2, 3, 3, 4]) {
      await saveCheckpoint(layer, "run", step, { "a": String(step) }, { keep: 3 });
    }
    expect(await listCheckpoints(layer, "run")).toEqual(
      ["step-00000003", "step-00000003-2", "step-00000004"],
    );
    expect((await openCheckpoint(layer, "run", { step: 3 }))?.name).toBe("step-00000003-2");
    expect(await openCheckpoint(layer, "run", { step: 2 })).toBeNull();
    expect(await openCheckpoint(layer, "nowhere")).toBeNull();
    // Going back: the newest save is current although its step is not the largest.
    expect(await saveCheckpoint(layer, "run", 2, { "a": "again" }, { keep: 2 })).toBe("step-00000002");
    expect(await contents(layer, "run")).toEqual({ a: "again" });
    expect(await listCheckpoints(layer, "run")).toEqual(["step-00000002", "step-00000004"]);
  });

  test("content as bytes, text or pieces", async () => {
    const layer = disk();
    const pieces = async function* () {
      yield Uint8Array.of(65);
      yield Uint8Array.of(66, 67);
    };
    const files: Files = { "a.bin": Uint8Array.of(1), "b.txt": "é", "c.bin": pieces() };
    await saveCheckpoint(layer, "run", 7, files);
    const saved = (await openCheckpoint(layer, "run"))!;
    expect([saved.step, saved.name, saved.path]).toEqual([7, "step-00000007", "run/step-00000007"]);
    expect(saved.files.map(({ name, size }) => [name, size])).toEqual(
      [["a.bin", 1], ["b.txt", 2], ["c.bin", 3]],
    );
    expect(await saved.read("c.bin")).toEqual(Uint8Array.of(65, 66, 67));
    const source = await saved.open("c.bin");
    expect(await source.read(1, 1)).toEqual(Uint8Array.of(66));
    await expect(saved.open("manifest.json")).rejects.toThrow('expected a file "manifest.json", found none');
  });

  test("names, steps and counts out of range", async () => {
    const layer = disk();
    for (const name of ["../a", "a/b", "manifest.json", ""]) {
      await expect(saveCheckpoint(layer, "run", 1, { [name]: "" })).rejects.toThrow(
        /expected a plain file name/,
      );
    }
    await expect(saveCheckpoint(layer, "run", -1, {})).rejects.toThrow("step: expected an integer from 0");
    await expect(saveCheckpoint(layer, "run", 1, {}, { keep: 0 })).rejects.toThrow(
      "keep: expected an integer >= 1",
    );
    expect(await layer.list("run")).toEqual([]);
  });

  test("one writer at a time", async () => {
    const machine = new SimulatedDisk();
    const [first, second] = [machine.process("host:1"), machine.process("host:2")];
    let failed: unknown;
    const whileWriting = async function* () {
      failed = await saveCheckpoint(second, "run", 1, NEW).catch((error: unknown) => error);
      yield Uint8Array.of(1);
    };
    await saveCheckpoint(first, "run", 1, { "a.bin": whileWriting() });
    expect(failed).toBeInstanceOf(UsageError);
    expect(String(failed)).toContain("no other writer, found host:1 (if it is gone, delete run/lock)");
    expect(await contents(second, "run")).toEqual({ "a.bin": "\u0001" });
    await saveCheckpoint(second, "run", 2, NEW);
    const saves = [saveCheckpoint(first, "run", 3, OLD), saveCheckpoint(first, "run", 4, OLD)];
    const both = await Promise.allSettled(saves);
    expect(both.map(({ status }) => status).toSorted()).toEqual(["fulfilled", "rejected"]);
  });
});

describe("on a real disk", () => {
  const folders: string[] = [];
  const fresh = () => {
    const folder = mkdtempSync(join(tmpdir(), "krait-checkpoint-"));
    folders.push(folder);
    return folder;
  };
  afterEach(() => {
    for (const folder of folders.splice(0)) rmSync(folder, { recursive: true, force: true });
  });

  /** The real disk, dead from operation `at` on. */
  function dying(at: number): { layer: FileLayer; count: () => number } {
    const real = localFileLayer();
    let count = 0;
    const guard = <A extends unknown[], R>(run: (...args: A) => Promise<R>) =>
      async (...args: A): Promise<R> => {
        if (++count >= at) throw new Error("stopped");
        return await run(...args);
      };
    const layer: FileLayer = {
      ...real,
      makeFolder: guard(real.makeFolder), syncFolder: guard(real.syncFolder), rename: guard(real.rename),
      list: guard(real.list), remove: guard(real.remove), readText: guard(real.readText),
      create: guard(async (path: string) => {
        const file = await real.create(path);
        return file && { write: guard(file.write), sync: guard(file.sync), close: file.close };
      }),
    };
    return { layer, count: () => count };
  }

  test("stopped at every operation, then continued", async () => {
    const trial = fresh();
    await saveCheckpoint(localFileLayer(), trial, 1, OLD, { keep: 1 });
    const counted = dying(Infinity);
    await saveCheckpoint(counted.layer, trial, 2, NEW, { keep: 1 });
    const root = fresh();
    const real = localFileLayer();
    for (let at = 1; at <= counted.count(); at++) {
      await saveCheckpoint(real, root, 1, OLD, { keep: 1 });
      await expect(saveCheckpoint(dying(at).layer, root, 2, NEW, { keep: 1 })).rejects.toThrow("stopped");
      expect([asText(OLD), asText(NEW)]).toContainEqual(await contents(real, root));
    }
  });

  test("killed while saving again and again", async () => {
    const root = fresh();
    const script = new URL("../support/save_forever.ts", import.meta.url).pathname;
    const loader = new URL("../../src/cli/source.mjs", import.meta.url).pathname;
    let next = 1;
    for (const delay of [0, 3, 11, 17]) {
      const command = [loader, script, root, String(next)];
      const child = spawn(process.execPath, command, { stdio: ["ignore", "pipe", "inherit"] });
      let done = next - 1;
      const exited = once(child, "exit");
      await new Promise<void>((resolve, reject) => {
        child.stdout.on("data", (lines) => {
          done = Number(String(lines).trim().split("\n").at(-1));
          if (done > next) resolve();
        });
        child.once("exit", () => reject(new Error("the saving process ended by itself")));
      });
      await new Promise((resolve) => setTimeout(resolve, delay));
      child.kill("SIGKILL");
      expect(await exited).toEqual([null, "SIGKILL"]);
      const saved = (await openCheckpoint(localFileLayer(), root))!;
      expect(saved.step).toBeGreaterThanOrEqual(done);
      expect(JSON.parse(Buffer.from(await saved.read("state.json")).toString())).toEqual(
        { step: saved.step },
      );
      expect(new Set(await saved.read("weights.bin"))).toEqual(new Set([saved.step % 251]));
      next = saved.step + 1;
    }
    // A kill between a folder's last rename and the switch leaves a finished folder of this step, which stays
    // unchanged while the next one is written beside it.
    const name = await saveCheckpoint(localFileLayer(), root, next, OLD, { keep: 1 });
    expect(name).toMatch(new RegExp(`^step-${String(next).padStart(8, "0")}(-2)?$`));
    expect(readdirSync(root)).toEqual(["latest", name]);
  });

  test("locks of running, dead and foreign writers", async () => {
    const root = fresh();
    const lock = join(root, "lock");
    const save = () => saveCheckpoint(localFileLayer(), root, 1, OLD);
    writeFileSync(lock, `${hostname()}:${process.ppid} some-token\n`);
    await expect(save()).rejects.toThrow(
      `found ${hostname()}:${process.ppid} (if it is gone, delete ${lock})`,
    );
    writeFileSync(lock, "elsewhere:1 some-token\n");
    await expect(save()).rejects.toThrow(UsageError);
    // No process has the first number; our own without a live lock is what a restarted machine leaves.
    writeFileSync(lock, `${hostname()}:999999999 some-token\n`);
    await save();
    writeFileSync(lock, `${hostname()}:${process.pid} some-token\n`);
    await save();
    writeFileSync(lock, "");
    await save();
    expect(readdirSync(root)).toEqual(["latest", "step-00000001", "step-00000001-2", "step-00000001-3"]);
  });

  test.each<[string, (folder: string, root: string) => void, RegExp]>([
    ["a changed byte", (folder) => writeFileSync(join(folder, "optim.bin"), "odl"),
      /optim\.bin: expected SHA-256 [0-9a-f]{64}, found [0-9a-f]{64}/],
    ["a truncated file", (folder) => truncateSync(join(folder, "optim.bin"), 2),
      /optim\.bin: expected 3 bytes, found 2/],
    ["a missing file", (folder) => rmSync(join(folder, "optim.bin")), /expected 3 bytes, found no file/],
    ["no manifest", (folder) => rmSync(join(folder, "manifest.json")), /json: expected a manifest/],
    ["half a manifest", (folder) => truncateSync(join(folder, "manifest.json"), 40),
      /manifest\.json: line \d+/],
    ["a foreign manifest", (folder) => writeFileSync(join(folder, "manifest.json"),
      '{"format":"x","version":1}'),
      /expected format "krait-checkpoint" version 1/],
    ["a manifest that leaves the folder", (folder) => {
      const path = join(folder, "manifest.json");
      writeFileSync(path, readFileSync(path, "utf8").replace("optim.bin", "../optim.bin"));
    }, /expected name, size and sha256, found/],
    ["a manifest without files", (folder) => writeFileSync(join(folder, "manifest.json"),
      '{"format":"krait-checkpoint","version":1,"step":1}'), /expected a list "files"/],
    ["a manifest without a step", (folder) => writeFileSync(join(folder, "manifest.json"),
      '{"format":"krait-checkpoint","version":1,"step":-1,"files":[]}'),
      /expected "step" to be an integer >= 0/],
    ["a pointer to nothing", (_, root) => writeFileSync(join(root, "latest"), "step-00000009\n"),
      /latest: expected the name of a checkpoint beside it, found "step-00000009"/],
    ["a pointer out of the folder", (_, root) => writeFileSync(join(root, "latest"), "../../etc"),
      /latest: expected the name of a checkpoint beside it/],
  ])("%s is noticed", async (_, damage, message) => {
    const root = fresh();
    const name = await saveCheckpoint(localFileLayer(), root, 1, OLD);
    damage(join(root, name), root);
    const opened = openCheckpoint(localFileLayer(), root);
    await expect(opened).rejects.toThrow(FormatError);
    await expect(opened).rejects.toThrow(message);
  });

  test("without verification only sizes are compared; without a pointer the newest step counts", async () => {
    const root = fresh();
    const name = await saveCheckpoint(localFileLayer(), root, 1, OLD);
    writeFileSync(join(root, name, "optim.bin"), "odl");
    expect((await openCheckpoint(localFileLayer(), root, { verify: false }))?.step).toBe(1);
    await saveCheckpoint(localFileLayer(), root, 2, NEW);
    rmSync(join(root, "latest"));
    expect((await openCheckpoint(localFileLayer(), root))?.step).toBe(2);
  });
});
