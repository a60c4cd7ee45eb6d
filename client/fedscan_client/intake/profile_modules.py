"""De-identification tables of ordinary images, module by module. `profile.py` explains the form.

Kept is what identifies the image within the project (pseudonyms), what the agent trains and groups by, and what a
reader needs to show the pixels in their place; and an element without which the standard calls the object invalid.
Times of day are not kept: only whole days are shifted, and nothing of the agent's needs the hour. Size and weight are
not kept either, because nothing uses them.
"""

from fedscan_client.intake.profile import tables

MODULES = tables(r"""
[PATIENT] C.7.1.1 Patient
0010,0010 PatientName empty 2
0010,0020 PatientID pid 1
0010,0030 PatientBirthDate empty 2
0010,0040 PatientSex code 2

[STUDY] C.7.2.1 General Study; C.7.2.2 Patient Study
0008,0020 StudyDate date 2
0008,0030 StudyTime empty 2
0008,0050 AccessionNumber empty 2
0008,0090 ReferringPhysicianName empty 2
0008,1030 StudyDescription words 3
0010,1010 PatientAge age 3
0020,000D StudyInstanceUID uid 1
0020,0010 StudyID empty 2

[SERIES] C.7.3.1 General Series
0008,0021 SeriesDate date 3
0008,0060 Modality code 2
0008,103E SeriesDescription words 3
0018,0015 BodyPartExamined code 2c
0018,1030 ProtocolName words 3
0018,5100 PatientPosition code 2c
0020,000E SeriesInstanceUID uid 1
0020,0011 SeriesNumber number:0:99999 2
0020,0060 Laterality code 2c

[EQUIPMENT] C.7.5.1 General Equipment
0008,0070 Manufacturer maker 2

[IMAGE] C.7.6.1 General Image; C.12.1 SOP Common
0008,0008 ImageType imagetype 3
0008,0016 SOPClassUID class 1
0008,0018 SOPInstanceUID uid 1
0008,0022 AcquisitionDate date 3
0008,0023 ContentDate date 2c
0008,0033 ContentTime empty 2c
0008,1140 ReferencedImageSequence items:REFERENCE 3
0008,2112 SourceImageSequence items:REFERENCE 3
0008,2218 AnatomicRegionSequence codes:4,4009,4031 2c
0008,3010 IrradiationEventUID uid 3
0020,0012 AcquisitionNumber number:0:999999 2c
0020,0013 InstanceNumber number:0:999999 2
0020,0020 PatientOrientation code 2c
0020,0062 ImageLaterality code 3
0028,0301 BurnedInAnnotation code 3
0028,0302 RecognizableVisualFeatures code 3
0028,2110 LossyImageCompression code 3
0028,2112 LossyImageCompressionRatio number:1:100000 3
0028,2114 LossyImageCompressionMethod code 3
0040,0555 AcquisitionContextSequence empty 2c
2050,0020 PresentationLUTShape code 3

[REFERENCE] C.7.6.1 referenced and source images (Table 10-3)
0008,1150 ReferencedSOPClassUID class 1
0008,1155 ReferencedSOPInstanceUID uid 1

[PIXELS] C.7.6.3 Image Pixel; C.7.6.6 Multi-frame
0028,0002 SamplesPerPixel pixels 1
0028,0004 PhotometricInterpretation pixels 1
0028,0006 PlanarConfiguration pixels 3
0028,0008 NumberOfFrames pixels 3
0028,0010 Rows pixels 1
0028,0011 Columns pixels 1
0028,0034 PixelAspectRatio number:1:100000 3
0028,0100 BitsAllocated pixels 1
0028,0101 BitsStored pixels 1
0028,0102 HighBit pixels 1
0028,0103 PixelRepresentation pixels 1
7FE0,0010 PixelData pixels 1

[GREY] C.11.1 Modality LUT; C.11.2 VOI LUT; C.7.5.1.1.2 Pixel Padding
0028,0120 PixelPaddingValue number:-32768:65535 3
0028,0121 PixelPaddingRangeLimit number:-32768:65535 3
0028,1040 PixelIntensityRelationship code 3
0028,1041 PixelIntensityRelationshipSign number:-1:1 3
0028,1050 WindowCenter number:-1e9:1e9 3
0028,1051 WindowWidth number:0:1e9 3
0028,1052 RescaleIntercept number:-1e9:1e9 1c
0028,1053 RescaleSlope number:-1e9:1e9 1c
0028,1054 RescaleType code 2c
0028,1056 VOILUTFunction code 3
0028,3000 ModalityLUTSequence items:MODALITY_LUT 1c
0028,3010 VOILUTSequence items:VOI_LUT 3

[MODALITY_LUT] C.11.1 Modality LUT
0028,3002 LUTDescriptor lut 1
0028,3004 ModalityLUTType code 2
0028,3006 LUTData lut 1

[VOI_LUT] C.11.2 VOI LUT
0028,3002 LUTDescriptor lut 1
0028,3006 LUTData lut 1

[PLANE] C.7.6.2 Image Plane; C.7.4.1 Frame of Reference
0018,0050 SliceThickness number:0:1000 2c
0018,0088 SpacingBetweenSlices number:-1000:1000 3
0020,0032 ImagePositionPatient number:-100000:100000 3
0020,0037 ImageOrientationPatient number:-1.001:1.001 3
0020,0052 FrameOfReferenceUID frame 3
0020,1040 PositionReferenceIndicator empty 2c
0020,1041 SliceLocation number:-100000:100000 3
0028,0030 PixelSpacing number:0:1000 3

[PROJECTION] C.8.7.5 and C.8.11.3, pixel spacing at the detector
0018,1164 ImagerPixelSpacing number:0:1000 3
0018,2010 NominalScannedPixelSpacing number:0:1000 3
0018,5101 ViewPosition code 2c

[CT] C.8.2.1 CT Image
0018,0060 KVP number:0:1000 2
0018,1120 GantryDetectorTilt number:-90:90 3

[MR] C.8.3.1 MR Image
0018,0020 ScanningSequence code 3
0018,0021 SequenceVariant code 3
0018,0022 ScanOptions code 2
0018,0023 MRAcquisitionType code 2
0018,0080 RepetitionTime number:0:1000000 2c
0018,0081 EchoTime number:0:1000000 2
0018,0082 InversionTime number:0:1000000 2c
0018,0091 EchoTrainLength number:0:100000 2
0018,1060 TriggerTime number:0:1000000 2c
0018,0086 EchoNumbers number:0:1000 3
0020,0100 TemporalPositionIdentifier number:0:100000 3

[PT] C.8.9.1 PET Series; C.8.9.4 PET Image
0008,0031 SeriesTime dummy:000000 1
0008,0032 AcquisitionTime empty 2
0018,1060 TriggerTime number:0:1000000 3
0018,1063 FrameTime number:0:1000000000 3
0018,1181 CollimatorType code 2
0018,1242 ActualFrameDuration number:0:1000000000 3
0028,0051 CorrectedImage code 2
0054,0016 RadiopharmaceuticalInformationSequence empty 2
0054,0061 NumberOfRRIntervals number:0:65535 3
0054,0071 NumberOfTimeSlots number:0:65535 3
0054,0081 NumberOfSlices number:0:65535 3
0054,0101 NumberOfTimeSlices number:0:65535 3
0054,0410 PatientOrientationCodeSequence codes:19:PATIENT_MODIFIER 2
0054,0414 PatientGantryRelationshipCodeSequence codes:21 2
0054,1000 SeriesType code 3
0054,1001 Units code 3
0054,1002 CountsSource code 3
0054,1004 ReprojectionMethod code 2c
0054,1102 DecayCorrection code 3
0054,1300 FrameReferenceTime number:-1e9:1e9 3
0054,1321 DecayFactor number:0:1000000000 3
0054,1330 ImageIndex number:0:65535 3

[PATIENT_MODIFIER] C.8.4.6.1 NM/PET Patient Orientation
0054,0412 PatientOrientationModifierCodeSequence codes:20 2c

[DX] C.8.11.1 to C.8.11.5 DX Series, Anatomy, Image, Detector, Positioning
0008,0068 PresentationIntentType code 3
0018,1508 PositionerType code 2c
0018,7004 DetectorType code 2c
0054,0220 ViewCodeSequence codes:4010,4014:VIEW_MODIFIER 2c

[VIEW_MODIFIER] C.8.11.5 DX Positioning; C.8.11.7 Mammography Image
0054,0222 ViewModifierCodeSequence codes:4011,4015 2c

[MG] C.8.11.7 Mammography Image
0028,1300 BreastImplantPresent code 3
0040,0318 OrganExposed code 3

[CINE] C.7.6.5 Cine; C.7.6.6 Multi-frame
0018,1063 FrameTime number:0:1000000000 3
0018,1065 FrameTimeVector number:0:1000000000:100000 3
0028,0009 FrameIncrementPointer pointer 3

[US] C.8.5.5 US Region Calibration; C.8.5.6 US Image
0018,6011 SequenceOfUltrasoundRegions items:US_REGION 3
0028,0014 UltrasoundColorDataPresent number:0:1 3

[US_REGION] C.8.5.5 US Region Calibration
0018,6012 RegionSpatialFormat number:0:65535 3
0018,6014 RegionDataType number:0:65535 3
0018,6016 RegionFlags number:0:65535 3
0018,6018 RegionLocationMinX0 number:0:65535 3
0018,601A RegionLocationMinY0 number:0:65535 3
0018,601C RegionLocationMaxX1 number:0:65535 3
0018,601E RegionLocationMaxY1 number:0:65535 3
0018,6020 ReferencePixelX0 number:-65535:65535 3
0018,6022 ReferencePixelY0 number:-65535:65535 3
0018,6024 PhysicalUnitsXDirection number:0:255 3
0018,6026 PhysicalUnitsYDirection number:0:255 3
0018,6028 ReferencePixelPhysicalValueX number:-1e9:1e9 3
0018,602A ReferencePixelPhysicalValueY number:-1e9:1e9 3
0018,602C PhysicalDeltaX number:-1e9:1e9 3
0018,602E PhysicalDeltaY number:-1e9:1e9 3

[SC] C.8.6.1 SC Equipment
0008,0064 ConversionType code 3

[XA] C.8.7.1 to C.8.7.5 X-Ray Image, Acquisition, Positioner
0018,0060 KVP number:0:1000 2c
0018,1150 ExposureTime number:0:10000000 2c
0018,1151 XRayTubeCurrent number:0:1000000 2c
0018,1152 Exposure number:0:10000000 2c
0018,1155 RadiationSetting code 3
0018,1500 PositionerMotion code 2c
0018,1510 PositionerPrimaryAngle number:-360:360 2c
0018,1511 PositionerSecondaryAngle number:-360:360 2c

[NM] C.8.4.8 to C.8.4.19 NM Multi-frame, Isotope, Detector, TOMO, Gated, Phase, Reconstruction
0018,0070 CountsAccumulated number:0:1e9 2c
0018,0088 SpacingBetweenSlices number:-1000:1000 2c
0018,1242 ActualFrameDuration number:0:1000000000 3
0018,1243 CountRate number:0:1e9 3
0028,0051 CorrectedImage code 3
0054,0010 EnergyWindowVector number:0:65535:100000 3
0054,0011 NumberOfEnergyWindows number:0:65535 3
0054,0012 EnergyWindowInformationSequence items:ENERGY_WINDOW 2c
0054,0016 RadiopharmaceuticalInformationSequence empty 2c
0054,0020 DetectorVector number:0:65535:100000 3
0054,0021 NumberOfDetectors number:0:65535 3
0054,0022 DetectorInformationSequence items:NM_DETECTOR 2c
0054,0030 PhaseVector number:0:65535:100000 3
0054,0031 NumberOfPhases number:0:65535 3
0054,0032 PhaseInformationSequence items:NM_PHASE 2c
0054,0050 RotationVector number:0:65535:100000 3
0054,0051 NumberOfRotations number:0:65535 3
0054,0052 RotationInformationSequence items:NM_ROTATION 2c
0054,0060 RRIntervalVector number:0:65535:100000 3
0054,0061 NumberOfRRIntervals number:0:65535 3
0054,0070 TimeSlotVector number:0:65535:100000 3
0054,0071 NumberOfTimeSlots number:0:65535 3
0054,0080 SliceVector number:0:65535:100000 3
0054,0081 NumberOfSlices number:0:65535 3
0054,0090 AngularViewVector number:0:65535:100000 3
0054,0100 TimeSliceVector number:0:65535:100000 3
0054,0101 NumberOfTimeSlices number:0:65535 3
0054,0202 TypeOfDetectorMotion code 3
0054,0410 PatientOrientationCodeSequence codes:19:PATIENT_MODIFIER 2c
0054,0414 PatientGantryRelationshipCodeSequence codes:21 2c
0054,0500 SliceProgressionDirection code 3

[ENERGY_WINDOW] C.8.4.10 NM Isotope
0054,0013 EnergyWindowRangeSequence items:ENERGY_RANGE 3

[ENERGY_RANGE] C.8.4.10 NM Isotope
0054,0014 EnergyWindowLowerLimit number:0:100000 3
0054,0015 EnergyWindowUpperLimit number:0:100000 3

[NM_DETECTOR] C.8.4.11 NM Detector
0018,1145 CenterOfRotationOffset number:-1000:1000 3
0018,1147 FieldOfViewShape code 3
0018,1149 FieldOfViewDimensions number:0:10000 3
0018,1181 CollimatorType code 2c
0018,1182 FocalDistance number:0:100000 2c
0018,1183 XFocusCenter number:-100000:100000 3
0018,1184 YFocusCenter number:-100000:100000 3
0020,0032 ImagePositionPatient number:-100000:100000 2c
0020,0037 ImageOrientationPatient number:-1.001:1.001 2c
0028,0031 ZoomFactor number:0:1000 3
0054,0200 StartAngle number:-360:360 3
0054,0220 ViewCodeSequence codes:26 2c

[NM_PHASE] C.8.4.14 NM Phase
0018,1242 ActualFrameDuration number:0:1000000000 3
0054,0033 NumberOfFramesInPhase number:0:65535 3
0054,0036 PhaseDelay number:0:1000000000 3
0054,0038 PauseBetweenFrames number:0:1000000000 3

[NM_ROTATION] C.8.4.12 NM TOMO Acquisition
0018,1130 TableHeight number:-10000:10000 3
0018,1131 TableTraverse number:-10000:10000 3
0018,1140 RotationDirection code 3
0018,1142 RadialPosition number:0:10000:1000 2c
0018,1143 ScanArc number:0:720 3
0018,1144 AngularStep number:-360:360 3
0018,1242 ActualFrameDuration number:0:1000000000 3
0054,0053 NumberOfFramesInRotation number:0:65535 3
0054,0200 StartAngle number:-360:360 3
""")
