import { expect, test } from "vitest";
import { promote, scope, unscoped } from "../../src/tensor/scope.ts";
import type { Tensor } from "../../src/tensor/tensor.ts";
import { onEveryAdapter } from "../support/devices.ts";

const BYTES = 256; // of every tensor here

await onEveryAdapter((device) => {
  const live = () => device.pool.liveBytes / BYTES;
  const make = () => device.empty([4]);

  test("a scope frees what was made inside it, but not what it returns", () => {
    const before = make();
    const kept = scope(() => {
      make();
      make();
      return make();
    });
    expect(live()).toBe(2);
    for (const tensor of [before, kept]) tensor.dispose();
    expect(live()).toBe(0);
  });

  test("what is returned is found in arrays, maps and plain objects, however deep", () => {
    const result = scope(() => {
      make();
      const list = [make(), { inner: make() }] as const;
      return { list: [...list] as typeof list, map: new Map([["a", make()]]), count: 3, none: null };
    });
    expect(live()).toBe(3);
    for (const tensor of [result.list[0], result.list[1].inner, result.map.get("a")!]) tensor.dispose();
    expect(live()).toBe(0);
  });

  test("in a nested scope what is returned passes to the scope around, which frees it in turn", () => {
    scope(() => {
      make();
      const inner = scope(() => {
        make();
        return scope(() => make());
      });
      expect(live()).toBe(2);
      expect(inner.shape).toEqual([4]);
    });
    expect(live()).toBe(0);
  });

  test("promote hands a tensor on by one scope at a time", () => {
    scope(() => {
      let inner: Tensor | null = null;
      scope(() => {
        inner = promote(make());
        make();
      });
      expect(live()).toBe(1);
      scope(() => promote(inner)); // no tensor of this scope: nothing changes hands
      expect(live()).toBe(1);
    });
    expect(live()).toBe(0);
  });

  test("what is made unscoped belongs to its maker", () => {
    const kept: Tensor[] = [];
    scope(() => {
      kept.push(unscoped(() => make()));
      scope(() => kept.push(unscoped(() => scope(() => make()))));
    });
    expect(live()).toBe(2);
    for (const tensor of kept) tensor.dispose();
    expect(live()).toBe(0);
  });

  test("when unscoped work throws, what it made is freed, also in calls within it", () => {
    scope(() => {
      make();
      expect(() => unscoped(() => {
        make();
        scope(() => unscoped(() => [make(), make()]));
        expect(live()).toBe(4);
        throw new Error("thrown inside");
      })).toThrow("thrown inside");
      expect(live()).toBe(1);
      make();
    });
    expect(live()).toBe(0);
  });

  test("an exception frees everything and leaves the scope around in force", () => {
    scope(() => {
      make();
      expect(() => scope(() => {
        make();
        scope(() => {
          make();
          throw new Error("thrown inside");
        });
      })).toThrow("thrown inside");
      expect(live()).toBe(1);
      make();
      expect(live()).toBe(2);
    });
    expect(live()).toBe(0);
    const free = make(); // outside of every scope again
    expect(live()).toBe(1);
    free.dispose();
  });

  test("views share memory, which goes with the last of them", () => {
    const view = scope(() => make().reshape([2, 2]).prefix([1, 2]));
    expect(live()).toBe(1);
    view.retain();
    view.dispose();
    expect(live()).toBe(1);
    view.dispose();
    expect(live()).toBe(0);
    expect(() => view.dispose()).toThrow(/released more often/);
  });
});
