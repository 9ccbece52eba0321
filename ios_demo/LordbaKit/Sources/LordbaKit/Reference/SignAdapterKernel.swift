import CLordba
import Foundation

/// The C kernels on one thread: y += s_out * (B (s_mid * (A (s_in * x)))).
final class SignAdapterKernel {
  private let kernels: OpaquePointer
  private var workspace = UnsafeMutableRawBufferPointer(start: nil, count: 0)

  /// `isa`: the instruction set by its name, nil for the fastest that this CPU has.
  init(isa: String? = nil) throws {
    guard let kernels = isa.map({ lordba_select($0) }) ?? lordba_select(nil) else {
      throw LordbaError("this CPU has no kernels '\(isa ?? "any")'")
    }
    self.kernels = kernels
  }

  deinit { workspace.deallocate() }

  var isa: String { String(cString: lordba_isa(kernels)) }

  /// `x` is [tokens][d_in], `y` [tokens][d_out].
  func add(_ module: lordba_module, _ x: [Float], tokens: Int, to y: inout [Float]) throws {
    let (dIn, dOut) = (Int(module.d_in), Int(module.d_out))
    precondition(x.count == tokens * dIn && y.count == tokens * dOut, "sizes that do not fit the module")
    let status = withUnsafePointer(to: module) { module in
      x.withUnsafeBufferPointer { x in
        y.withUnsafeMutableBufferPointer { y in
          var call = lordba_call(
            modules: module, count: 1, dtype: LORDBA_F32, tokens: tokens, x: x.baseAddress, x_stride: dIn,
            base: UnsafeRawPointer(y.baseAddress), base_stride: dOut, y: y.baseAddress, y_stride: dOut)
          return apply(&call)
        }
      }
    }
    guard status == LORDBA_OK else { throw LordbaError("sign adapter: \(String(cString: lordba_status_text(status)))") }
  }

  private func apply(_ call: inout lordba_call) -> lordba_status {
    var plan = lordba_plan()
    let status = lordba_plan_call(kernels, &call, 1, &plan)
    if status != LORDBA_OK { return status }
    if workspace.count < plan.workspace {
      workspace.deallocate()
      workspace = .allocate(byteCount: plan.workspace, alignment: Int(LORDBA_ALIGNMENT))
    }
    return lordba_apply(kernels, &call, workspace.baseAddress, workspace.count)
  }
}
