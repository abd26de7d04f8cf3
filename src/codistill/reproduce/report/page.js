"use strict";
(() => {
  const sections = JSON.parse(document.getElementById("data").textContent);
  // Distinct in hue and lightness on a light and a dark background; further groups repeat the colors with other dashes.
  const COLORS = ["#3d7be0", "#d9730d", "#1f9e6e", "#c4418f", "#8a6ae0", "#a88400", "#1496b3", "#d64a40", "#76818e", "#6b9a1f"];
  const DASHES = ["solid", "dash", "dot", "dashdot"];
  const HEATMAP_COLORS = { light: [[0, "#eef3fb"], [0.5, "#6f9fe6"], [1, "#123a80"]], dark: [[0, "#1c2633"], [0.5, "#3f75c4"], [1, "#d5e5ff"]] };
  const root = document.documentElement;
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const plots = [];
  let chosenTheme = null;

  const theme = () => chosenTheme ?? (prefersDark.matches ? "dark" : "light");
  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const mergeDeep = (a, b) => {
    const out = { ...a };
    for (const [key, value] of Object.entries(b ?? {})) {
      out[key] = value && typeof value === "object" && !Array.isArray(value) ? mergeDeep(out[key] ?? {}, value) : value;
    }
    return out;
  };
  const fade = (hex, alpha) => `rgba(${[1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)).join(",")},${alpha})`;
  const styleOf = (index) => ({ color: COLORS[index % COLORS.length], dash: DASHES[Math.floor(index / COLORS.length) % DASHES.length] });

  function styleTrace(trace, index, section) {
    const { group, band, heat, guide, dash, ...rest } = trace;
    const position = group == null ? index : section.groups.indexOf(group);
    const style = styleOf(Math.max(position, 0));
    if (heat) {
      return { ...rest, colorscale: HEATMAP_COLORS[theme()], colorbar: { ...rest.colorbar, thickness: 10, outlinewidth: 0 } };
    }
    if (guide) return { ...rest, line: { color: css("--soft"), dash: "dot", width: 1 } };
    if (band) return { ...rest, fillcolor: fade(style.color, 0.11), showlegend: false };
    const error = rest.error_y ? { error_y: { ...rest.error_y, color: style.color, thickness: 1.2 } } : {};
    return { ...rest, ...error, line: { color: style.color, dash: dash ?? style.dash, width: 2 }, marker: { ...rest.marker, color: style.color } };
  }

  function layoutOf(view, narrow) {
    const axis = (title) => ({
      title: { text: title, standoff: 8 }, gridcolor: css("--grid"), zerolinecolor: css("--grid"),
      linecolor: css("--line"), fixedrange: narrow,
    });
    const heat = view.traces.some((trace) => trace.heat);
    const showEveryEpoch = view.x === "epoch" && view.traces.every((trace) => trace.x.every((x) => x <= 12));
    const ticks = showEveryEpoch ? { dtick: 1 } : {};
    const names = view.traces.filter((trace) => trace.name).length;
    return mergeDeep({
      autosize: true, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: css("--ink"), size: narrow ? 11 : 12, family: getComputedStyle(document.body).fontFamily },
      margin: { l: 54, r: 12, t: 12, b: 46 }, hovermode: "closest",
      xaxis: { ...axis(view.x), ...ticks, automargin: heat }, yaxis: { ...axis(view.y), automargin: heat },
      hoverlabel: { bgcolor: css("--paper"), bordercolor: css("--line"), font: { color: css("--ink") } },
      // The buttons above the charts name the groups, so that these charts need no legend.
      showlegend: !heat && view.traces.every((trace) => trace.group == null) && names > 1,
      legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", font: { size: 11 } },
    }, view.layout);
  }

  function draw(plot) {
    const { section, chart, node, choice, hidden } = plot;
    const view = chart.views[choice()];
    const shown = view.traces.filter((trace) => trace.group == null || !hidden.has(trace.group));
    const traces = shown.map((trace, index) => styleTrace(trace, index, section));
    const options = { responsive: true, displaylogo: false, displayModeBar: false };
    return Plotly.react(node, traces, layoutOf(view, innerWidth < 640), options);
  }

  function createElement(tag, properties, ...children) {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
  }

  sections.forEach((section, number) => {
    const container = document.getElementById(`charts-${number}`);
    const hidden = new Set();
    const sectionPlots = [];
    const chips = document.getElementById(`chips-${number}`);
    section.groups.forEach((group, index) => {
      const dot = createElement("span", { className: "dot" });
      dot.style.background = styleOf(index).color;
      const chip = createElement("button", { className: "chip", type: "button", title: "show or hide in all charts" }, dot, group);
      chip.setAttribute("aria-pressed", "true");
      chip.addEventListener("click", () => {
        const off = !hidden.delete(group);
        if (off) hidden.add(group);
        chip.setAttribute("aria-pressed", String(!off));
        sectionPlots.forEach(draw);
      });
      chips.append(chip);
    });
    section.charts.forEach((chart) => {
      const select = createElement("select", { ariaLabel: `What ${chart.title} shows` });
      chart.views.forEach((view) => select.append(createElement("option", { textContent: view.name })));
      const node = createElement("div", { className: "plot" });
      const heading = createElement("h3", { textContent: chart.title, className: "chosen" });
      const head = createElement("div", { className: "head" }, heading, ...(chart.views.length > 1 ? [select] : []));
      const label = () => (heading.dataset.view = chart.views[select.selectedIndex].name);
      const plot = { section, chart, node, hidden, choice: () => Math.max(select.selectedIndex, 0) };
      select.addEventListener("change", () => { label(); draw(plot); });
      container.append(createElement("figure", {}, head, createElement("p", { className: "note", textContent: chart.note }), node));
      label();
      sectionPlots.push(plot);
      plots.push(plot);
    });
  });

  function repaint() {
    root.dataset.theme = theme();
    return Promise.all(plots.map(draw));
  }
  document.getElementById("theme").addEventListener("click", () => {
    chosenTheme = theme() === "dark" ? "light" : "dark";
    repaint();
  });
  prefersDark.addEventListener("change", repaint);
  let themeBeforePrint = null;
  addEventListener("beforeprint", () => { themeBeforePrint = chosenTheme; chosenTheme = "light"; repaint(); });
  addEventListener("afterprint", () => { chosenTheme = themeBeforePrint; repaint(); });
  document.querySelectorAll("button[data-copy]").forEach((button) => {
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(button.parentElement.querySelector("pre").textContent);
      button.textContent = "copied";
    });
  });
  repaint().then(() => { root.dataset.drawn = String(plots.length); });
})();
