"use strict";
// Panels that stand side by side are stacked where the screen is too narrow for them.
const arranged = (layout, width) => {
  const panels = (layout.meta && layout.meta.panels) || 1;
  if (panels < 2 || width >= 190 * panels) return layout;
  const out = structuredClone(layout);
  const gap = 0.26 / panels, height = (1 - gap * (panels - 1)) / panels;
  out.height = 110 + 260 * panels;
  for (let i = 1; i <= panels; i++) {
    const n = i === 1 ? "" : i, top = 1 - (i - 1) * (height + gap);
    out["xaxis" + n].domain = [0, 1];
    Object.assign(out["yaxis" + n], { domain: [Math.max(top - height, 0), top], showticklabels: true });
    out["yaxis" + n].title = structuredClone(out.yaxis.title);
    if (out.annotations && out.annotations[i - 1]) Object.assign(out.annotations[i - 1], { x: 0.5, y: top });
  }
  out.legend = { ...out.legend, y: 1 + 24 / (out.height - 96) };
  return out;
};

const unpacked = async (id) => {
  const text = document.getElementById(id).textContent;
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
};

const main = async () => {
  const plots = [...document.querySelectorAll(".plot")];
  if (!plots.length) return;
  const script = document.createElement("script");
  script.textContent = await unpacked("plotly-code");
  document.head.append(script);
  const draw = (plot) => {
    const spec = JSON.parse(document.getElementById(plot.id + "-data").textContent);
    const config = {
      responsive: true, displaylogo: false, displayModeBar: plot.clientWidth < 560 ? false : "hover", showSendToCloud: false,
      modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"],
      toImageButtonOptions: { format: "svg", filename: plot.dataset.name },
    };
    const layout = arranged({ ...spec.layout, autosize: true }, plot.clientWidth);
    plot.style.minHeight = (layout.height || 420) + "px"; // no blank below a low picture
    return Plotly.react(plot, spec.data, layout, config);
  };
  for (const plot of plots) {
    await draw(plot);
    plot.classList.add("drawn");
  }
  let width = window.innerWidth, timer = 0;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return;
    width = window.innerWidth;
    clearTimeout(timer);
    timer = setTimeout(() => plots.forEach(draw), 150);
  });
};

main().catch((error) => {
  console.error(error);
  for (const plot of document.querySelectorAll(".plot:not(.drawn)")) {
    plot.textContent = "This browser could not draw the figure: " + error.message;
  }
});
